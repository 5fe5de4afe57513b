"""Finds the attention of `exporter.nn.decoder_layer` and the norms of `exporter.nn.layers` in plain graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Mask:
    """A key is seen if its order is not above the query's.

    order: int64 [batch, seq], of the new tokens; past: [batch, past], of those before them, if any; total: both.
    """

    order: ir.Value
    past: ir.Value | None
    total: ir.Value
    node: ir.Node


@dataclass(frozen=True)
class Attention:
    """One layer's. q, k, v: [batch, seq, heads, head_dim] before the rotation; cos, sin: [batch, 1, seq, head_dim / 2]; past:
    keys and values; present: the same with the new ones; out: [batch, seq, heads * head_dim]."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    cos: ir.Value
    sin: ir.Value
    mask: Mask
    scale: float
    past: tuple[ir.Value, ir.Value] | None
    present: tuple[ir.Value, ir.Value]
    out: ir.Value


@dataclass(frozen=True)
class SkipNorm:
    """A root-mean-square norm of the sum of two values of one shape, made by `add`; that is used elsewhere, too."""

    add: ir.Node
    weight: ir.Value
    eps: float
    out: ir.Value


class _NoMatch(Exception):
    pass


def skip_norm(square: ir.Node) -> SkipNorm | None:
    """The norm around a Pow, or None if it is something else, or of something else than a sum."""
    try:
        total, exponent = square.inputs
        assert total is not None and exponent is not None
        a, b = _made(total, "Add")
        mean = _only_user(square.outputs[0], "ReduceMean")
        shifted = _only_user(mean.outputs[0], "Add")
        assert shifted.inputs[1] is not None
        root = _only_user(shifted.outputs[0], "Sqrt")
        normed = _only_user(root.outputs[0], "Div")
        scaled = _only_user(normed.outputs[0], "Mul")
        weight = scaled.inputs[1]
        same = a.shape is not None and b.shape is not None and list(a.shape) == list(b.shape)
        if _number(exponent) != 2 or normed.inputs[0] is not total or not same:
            return None
        if weight is None or weight.shape is None or len(weight.shape) != 1 or total.dtype != ir.DataType.FLOAT:
            return None
        add = total.producer()
        assert add is not None
        return SkipNorm(add, weight, _number(shifted.inputs[1]), scaled.outputs[0])
    except _NoMatch:
        return None


def attention(softmax: ir.Node) -> Attention | None:
    """The attention around a Softmax, or None if it is something else."""
    try:
        assert softmax.inputs[0] is not None
        scores, bias = _made(softmax.inputs[0], "Add")
        scaled, transposed = _made(scores, "MatMul")
        folded, scale = _made(scaled, "Mul")
        (key,) = _made(transposed, "Transpose")
        weighted = _only_user(softmax.outputs[0], "MatMul")
        value = weighted.inputs[1]
        unfolded = _only_user(weighted.outputs[0], "Reshape")
        swapped = _only_user(unfolded.outputs[0], "Transpose")
        merged = _only_user(swapped.outputs[0], "Reshape")
        assert value is not None
        past_key, new_key = _appended(key)
        past_value, new_value = _appended(value)
        q, cos, sin = _rotated(_made(folded, "Reshape")[0])
        k, *same = _rotated(new_key)
        (v,) = _made(new_value, "Transpose")
        if same[0] is not cos or same[1] is not sin:
            return None
        past = None if past_key is None or past_value is None else (past_key, past_value)
        out = merged.outputs[0]
        return Attention(q, k, v, cos, sin, _mask(bias), _number(scale), past, (key, value), out)
    except _NoMatch:
        return None


def _mask(bias: ir.Value) -> Mask:
    """Behind the mask's repetition for every head of a group."""
    parts = {id(v): v for v in _made(bias, "Concat")} if _is(bias, "Concat") else {id(bias): bias}
    if len(parts) != 1:
        raise _NoMatch
    (visible,) = parts.values()
    seen, allowed, _ = _made(visible, "Where")
    keys, queries = _made(seen, "LessOrEqual")
    total, order = _squeezed(keys), _squeezed(queries)
    if allowed.const_value is None or _number(allowed) != 0 or total.shape is None or len(total.shape) != 2:
        raise _NoMatch
    past = None
    if total is not order:
        past, new = _appended(total)
        if past is None or new is not order:
            raise _NoMatch
    node = visible.producer()
    assert node is not None
    return Mask(order, past, total, node)


def _squeezed(value: ir.Value) -> ir.Value:
    while _is(value, "Unsqueeze"):
        value = _made(value, "Unsqueeze")[0]
    return value


def _appended(value: ir.Value) -> tuple[ir.Value | None, ir.Value]:
    """The cache that a value goes on from, if it does, and what is new."""
    node = value.producer()
    if node is not None and node.op_type == "Concat" and node.inputs[0] is not None and node.inputs[0].is_graph_input():
        past, new = _made(value, "Concat")
        return past, new
    return None, value


def _rotated(value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """What was rotated in halves, [batch, seq, heads, head_dim], and cos and sin."""
    low, high = _made(value, "Concat")
    a_cos, b_sin = _made(low, "Sub")
    b_cos, a_sin = _made(high, "Add")
    (a, cos), (b, sin) = _made(a_cos, "Mul"), _made(b_sin, "Mul")
    if (*_made(b_cos, "Mul"), *_made(a_sin, "Mul")) != (b, cos, a, sin):
        raise _NoMatch
    node = a.producer()
    if node is None or node.op_type != "Split" or tuple(node.outputs) != (a, b) or node.inputs[0] is None:
        raise _NoMatch
    (plain,) = _made(node.inputs[0], "Transpose")
    return plain, cos, sin


def _is(value: ir.Value, kind: str) -> bool:
    node = value.producer()
    return node is not None and node.op_type == kind


def static(value: ir.Value, axis: int) -> int:
    """The size of an axis that is not dynamic."""
    size = None if value.shape is None else value.shape[axis]
    assert isinstance(size, int), value
    return size


def _made(value: ir.Value, kind: str) -> Sequence[ir.Value]:
    """Inputs of the node of that kind that made a value."""
    node = value.producer()
    if node is None or node.op_type != kind:
        raise _NoMatch
    return [v for v in node.inputs if v is not None]


def _only_user(value: ir.Value, kind: str) -> ir.Node:
    """The node of that kind that alone computes with a value."""
    users = [node for node in value.consumers() if node.op_type != "Shape"]
    if len(users) != 1 or users[0].op_type != kind:
        raise _NoMatch
    return users[0]


def _number(value: ir.Value) -> float:
    if value.const_value is None or value.const_value.size != 1:
        raise _NoMatch
    return float(value.const_value.numpy().reshape(()))
