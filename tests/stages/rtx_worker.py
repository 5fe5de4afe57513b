"""Builds graphs with TensorRT-RTX: a path per line on stdin, a line of JSON on stdout for each, "built" or what went wrong.

In a process of its own, because a parser that meets what it does not expect can take the process with it.
"""

from __future__ import annotations

import json
import os
import sys

import tensorrt_rtx as trt

BATCH, TEXT = (1, 1, 2), (1, 8, 32)


def build(path: str) -> str:
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        return "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        ranges = [(d, d, d) if d >= 0 else BATCH if axis == 0 else TEXT for axis, d in enumerate(tensor.shape)]
        profile.set_shape(tensor.name, *zip(*ranges, strict=True))
    config.add_optimization_profile(profile)
    return "built" if builder.build_serialized_network(network, config) is not None else "the build failed"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the library prints
    for line in sys.stdin:
        try:
            result = build(line.rstrip("\n"))
        except Exception as e:
            result = f"{type(e).__name__}: {e}"
        answers.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
