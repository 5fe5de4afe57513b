"""Builds graphs with TensorRT-RTX, one after another: {"jobs": {name: path}, "log": path} on stdin, a line per graph in the log.

In a process of its own, because a parser that meets what it does not expect can take the process with it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

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
    request: dict[str, Any] = json.load(sys.stdin)
    with open(request["log"], "w") as log:
        for name, path in request["jobs"].items():
            try:
                result = build(path)
            except Exception as e:
                result = f"{type(e).__name__}: {e}"
            print(json.dumps([name, result]), file=log, flush=True)


if __name__ == "__main__":
    main()
