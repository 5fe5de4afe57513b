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
class Core:
    """Attention without what is around it. q: [batch, heads, seq, head_dim], unscaled; k, v: [batch, kv_heads, total, head_dim];
    mask: [batch, 1 or kv_heads, seq, total], added to the scores, or the same for every head of a group behind one another, where
    they differ; out: [batch, heads, seq, head_dim]."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value
    scale: float
    out: ir.Value


@dataclass(frozen=True)
class Rotation:
    """In halves. x: [batch, heads, seq, head_dim]; cos, sin: [batch, 1, seq, head_dim / 2]; out: as x."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    out: ir.Value


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm over the last axis, in float32 whatever x is. weight: [dim]."""

    x: ir.Value
    weight: ir.Value
    eps: float
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


def norm(square: ir.Node) -> Norm | None:
    """The norm around a Pow, or None if it is something else."""
    try:
        wide, exponent = square.inputs
        assert wide is not None and exponent is not None
        mean = _only_user(square.outputs[0], "ReduceMean")
        shifted = _only_user(mean.outputs[0], "Add")
        assert shifted.inputs[1] is not None
        root = _only_user(shifted.outputs[0], "Sqrt")
        normed = _only_user(root.outputs[0], "Div")
        scaled = _only_user(_narrowed(normed.outputs[0]), "Mul")
        weight = scaled.inputs[1]
        if _number(exponent) != 2 or normed.inputs[0] is not wide:
            return None
        if weight is None or weight.shape is None or len(weight.shape) != 1 or wide.dtype != ir.DataType.FLOAT:
            return None
        return Norm(_unwidened(wide), weight, _number(shifted.inputs[1]), scaled.outputs[0])
    except _NoMatch:
        return None


def skip_norm(square: ir.Node) -> SkipNorm | None:
    """The norm around a Pow, or None if it is something else, or of something else than a sum in float32."""
    found = norm(square)
    add = None if found is None else found.x.producer()
    if found is None or add is None or add.op_type != "Add" or found.x.dtype != ir.DataType.FLOAT:
        return None
    a, b = add.inputs
    same = (
        a is not None
        and b is not None
        and a.shape is not None
        and b.shape is not None
        and list(a.shape) == list(b.shape)
    )
    return SkipNorm(add, found.weight, found.eps, found.out) if same else None


def rotation(joined: ir.Node) -> Rotation | None:
    """The rotation that ends in a Concat, or None if it is something else."""
    try:
        return _rotation(joined.outputs[0])
    except _NoMatch:
        return None


def core(softmax: ir.Node) -> Core | None:
    """The attention around a Softmax, whatever its mask says, or None if it is something else."""
    try:
        return _core(softmax)
    except _NoMatch:
        return None


def attention(softmax: ir.Node) -> Attention | None:
    """The attention around a Softmax with what leads to it, or None if it is something else than rotated and causal by `order`."""
    try:
        found = _core(softmax)
        swapped = _only_user(found.out, "Transpose")
        merged = _only_user(swapped.outputs[0], "Reshape")
        past_key, new_key = _appended(found.k)
        past_value, new_value = _appended(found.v)
        q, cos, sin = _rotated(found.q)
        k, *same = _rotated(new_key)
        (v,) = _made(new_value, "Transpose")
        if same[0] is not cos or same[1] is not sin:
            return None
        past = None if past_key is None or past_value is None else (past_key, past_value)
        present = found.k, found.v
        return Attention(q, k, v, cos, sin, _mask(found.mask), found.scale, past, present, merged.outputs[0])
    except _NoMatch:
        return None


def _core(softmax: ir.Node) -> Core:
    assert softmax.inputs[0] is not None
    scores, bias = _made(_unwidened(softmax.inputs[0]), "Add")
    scaled, transposed = _made(scores, "MatMul")
    folded, scale = _made(scaled, "Mul")
    (key,) = _made(transposed, "Transpose")
    weighted = _only_user(_narrowed(softmax.outputs[0]), "MatMul")
    value = weighted.inputs[1]
    assert value is not None
    unfolded = _only_user(weighted.outputs[0], "Reshape")
    parts = {id(v): v for v in _made(bias, "Concat")} if _is(bias, "Concat") else {id(bias): bias}
    mask = next(iter(parts.values())) if len(parts) == 1 else bias
    return Core(_made(folded, "Reshape")[0], key, value, mask, _number(scale), unfolded.outputs[0])


def _unwidened(value: ir.Value) -> ir.Value:
    """In front of a Cast to float32, if there is one."""
    node = value.producer()
    if node is not None and node.op_type == "Cast" and value.dtype == ir.DataType.FLOAT and node.inputs[0] is not None:
        return node.inputs[0]
    return value


def _narrowed(value: ir.Value) -> ir.Value:
    """Behind a Cast of a float32 value that alone uses it, if there is one."""
    users = [node for node in value.consumers() if node.op_type != "Shape"]
    return users[0].outputs[0] if len(users) == 1 and users[0].op_type == "Cast" else value


def _mask(visible: ir.Value) -> Mask:
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
    found = _rotation(value)
    (plain,) = _made(found.x, "Transpose")
    return plain, found.cos, found.sin


def _rotation(value: ir.Value) -> Rotation:
    low, high = _pair(value, "Concat")
    a_cos, b_sin = _pair(low, "Sub")
    b_cos, a_sin = _pair(high, "Add")
    (a, cos), (b, sin) = _pair(a_cos, "Mul"), _pair(b_sin, "Mul")
    if (*_pair(b_cos, "Mul"), *_pair(a_sin, "Mul")) != (b, cos, a, sin):
        raise _NoMatch
    node = a.producer()
    if node is None or node.op_type != "Split" or tuple(node.outputs) != (a, b) or node.inputs[0] is None:
        raise _NoMatch
    return Rotation(node.inputs[0], cos, sin, value)


def _pair(value: ir.Value, kind: str) -> Sequence[ir.Value]:
    """As `_made`, of a node with two inputs."""
    found = _made(value, kind)
    if len(found) != 2:
        raise _NoMatch
    return found


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
