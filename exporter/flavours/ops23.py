"""Newer ONNX operators for TensorRT 10.15 and newer and for TensorRT-RTX: attention, rotation and norm as one node each.

`Attention` takes the place of scale, scores, mask, softmax and their products, `RotaryEmbedding` that of every rotation in halves,
`RMSNormalization` that of every norm with its float32 island. What else stands in the graph stays.

Requires of the plain graphs
    Float16: TensorRT-RTX 1.7 has no kernel for `Attention` in float32. At least one attention in the form of
    `exporter.nn.decoder_layer`, of any mask that is one for all heads; those with capped scores or with masks of their own per KV
    head stay as they are.

Ensures
    Opset 23, IR 11; the same inputs, outputs and results. Every `Attention` has its mask as a tensor, one output and neither a past
    nor `is_causal`: all else is refused or misread by one of the parsers (`exporter/lint`).
"""

from __future__ import annotations

import onnx_ir as ir

from exporter.flavours._contract import Flavour, Refused
from exporter.flavours._pen import Pen
from exporter.flavours._plain import Core, Norm, Rotation, core, norm, rotation

OPSET, IR_VERSION = 23, 11


class Ops23(Flavour):
    backend = "trt"

    def rewrite(self, model: ir.Model) -> None:
        graph = model.graph
        nodes = list(graph)
        found = [c for c in (core(n) for n in nodes if n.op_type == "Softmax") if c is not None]
        cores = [c for c in found if c.mask.shape is not None and len(c.mask.shape) == 4 and c.mask.shape[1] == 1]
        if not cores:
            raise Refused("no layer attends in the plain form with one mask for all heads")
        if any(c.q.dtype != ir.DataType.FLOAT16 for c in cores):
            raise Refused("it is for float16 graphs: TensorRT-RTX has no kernel for Attention in float32")
        pen = Pen(model, "ops23")
        for attention in cores:
            _attend(pen, attention)
        flat: dict[ir.Value, ir.Value] = {}
        for rotated in [r for r in (rotation(n) for n in nodes if n.op_type == "Concat") if r is not None]:
            _rotate(pen, rotated, flat)
        for normed in [n for n in (norm(n) for n in nodes if n.op_type == "Pow") if n is not None]:
            _normalize(pen, normed)
        graph.opset_imports[""], model.ir_version = OPSET, IR_VERSION
        pen.done()


def _attend(pen: Pen, c: Core) -> None:
    _replace(c.out, pen("Attention", [c.q, c.k, c.v, c.mask], scale=c.scale))


def _rotate(pen: Pen, r: Rotation, flat: dict[ir.Value, ir.Value]) -> None:
    """flat: cos and sin without the axis of heads, drawn once for all layers."""
    for factors in (r.cos, r.sin):
        if factors not in flat:
            flat[factors] = pen("Squeeze", [factors, pen.ints(1)])
    _replace(r.out, pen("RotaryEmbedding", [r.x, flat[r.cos], flat[r.sin]]))


def _normalize(pen: Pen, n: Norm) -> None:
    _replace(n.out, pen("RMSNormalization", [n.x, n.weight], axis=-1, epsilon=n.eps, stash_type=1))


def _replace(old: ir.Value, new: ir.Value) -> None:
    """An output of the graph keeps its name."""
    new.type, new.shape = old.type, old.shape
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}_plain"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


FLAVOUR = Ops23()
