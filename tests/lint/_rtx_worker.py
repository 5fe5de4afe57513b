"""Parses and builds the graphs of a folder with TensorRT-RTX: `python _rtx_worker.py FOLDER`.

`<graph>.onnx` becomes `<graph>.json`. A graph that ends this process leaves an empty `<graph>.json`; start it again for the others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt


class Silent(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, text: str) -> None:
        if severity.name in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(" ".join(text.split()))


def take(path: Path) -> dict[str, Any]:
    """parsed, built: bool. layers: kind, operation, inputs, and outputs with their shapes, of each. errors: what was said."""
    logger = Silent()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = bool(parser.parse(path.read_bytes()))
    errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    layers = [layer(network.get_layer(i)) for i in range(network.num_layers)]
    built = False
    if parsed:
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
        profile = builder.create_optimization_profile()
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        for tensor in inputs:
            if tensor.is_shape_tensor:
                profile.set_shape_input(tensor.name, *([1] * max(1, sum(tensor.shape)) for _ in range(3)))
            elif -1 in tensor.shape:
                profile.set_shape(tensor.name, *([n if d == -1 else d for d in tensor.shape] for n in (2, 4, 8)))
        if any(tensor.is_shape_tensor or -1 in tensor.shape for tensor in inputs):
            config.add_optimization_profile(profile)
        built = builder.build_serialized_network(network, config) is not None
    return {"parsed": parsed, "built": built, "layers": layers, "errors": [*errors, *logger.errors]}


def layer(found: Any) -> list[Any]:
    kind = found.type.name
    inputs = [found.get_input(i) for i in range(found.num_inputs)]
    outputs = [found.get_output(i) for i in range(found.num_outputs)]
    operation = None
    if kind == "UNARY":
        found.__class__ = trt.IUnaryLayer
        operation = found.op.name
    if kind == "ACTIVATION":
        found.__class__ = trt.IActivationLayer
        operation = [found.type.name, round(found.alpha, 6)]
    return [
        kind,
        operation,
        [t.name for t in inputs if t is not None],
        [[t.name, list(t.shape)] for t in outputs if t is not None],
    ]


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
        result = path.with_suffix(".json")
        if not result.exists():
            result.touch()
            result.write_text(json.dumps(take(path)))
