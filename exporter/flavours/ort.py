"""ONNX Runtime on a CPU: attention as one operator over a cache that stays where it is.

`com.microsoft.GroupQueryAttention` and `RotaryEmbedding` take the place of every layer's rotation, mask, scores and
softmax, `SkipSimplifiedLayerNormalization` that of every sum of a residual and its norm. GroupQueryAttention leaves out what lies above the diagonal, and it appends in place where a runner binds a
layer's past and present to the same memory (`exporter.backends.ort`).

Requires of the plain graphs
    Float32, and every attention in the form of `exporter.nn.decoder_layer`: rotated in halves, causal by `order` alone. So no
    sliding windows, capped scores, sizes of merged tokens, INT8 caches, or cached tokens that differ from head to head. Nothing else
    looks at the cache. No two real tokens of a row have the same `order`.

Ensures
    The same inputs, outputs and results, but for two things. Cached tokens of a row stand in the order of the prompt with
    nothing between them: where rows are padded, what lies behind a row's real tokens means nothing, and the next token
    overwrites it. And `past_key_i`, `past_value_i` may be longer than what they hold: their axis is a *capacity* (it is
    called so in the graph); what counts is how long `past_order_g` is.

GroupQueryAttention knows tokens by where they stand, so they are sorted: once at the entry of a graph that goes on from a
past; around every attention where a reduction's nodes want visual tokens in front (a prefill graph of its own). Several
tokens of several rows behind a past are more than it takes: they have to be run one after another.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from exporter.flavours._contract import CAPACITY, Flavour, Refused
from exporter.flavours._pen import Pen
from exporter.flavours._plain import Attention, Mask, SkipNorm, attention, skip_norm, static
from exporter.graphset import PAD


class Ort(Flavour):
    backend = "ort"

    def rewrite(self, model: ir.Model) -> None:
        graph = model.graph
        if any((v.name or "").startswith("present_scale_") for v in graph.outputs):
            raise Refused("keys and values are INT8, and GroupQueryAttention keeps floats on a CPU")
        layers = [a for a in map(attention, (n for n in graph if n.op_type == "Softmax")) if a is not None]
        expected = sum((v.name or "").startswith("present_key_") for v in graph.outputs)
        if len(layers) != expected:
            raise Refused(
                f"{expected - len(layers)} of {expected} layers attend in another form than the plain causal one"
            )
        if any(a.q.dtype != ir.DataType.FLOAT for a in layers):
            raise Refused("it is for float32 graphs")
        pen = Pen(model, "ort")
        if layers[0].past is None:
            _sort_around(graph, pen, layers)
        else:
            _sort_at_entry(graph, pen, layers)
        for norm in [n for n in map(skip_norm, (n for n in graph if n.op_type == "Pow")) if n is not None]:
            _fuse(norm, pen)
        pen.done()
        _check_cache(graph, layers)


def _fuse(norm: SkipNorm, pen: Pen) -> None:
    """The sum and its norm in one operator."""
    total = norm.add.outputs[0]
    made = [ir.Value(name=name) for name in (None, "", "", None)]
    made[3].type, made[3].shape = total.type, total.shape
    pen.node("SkipSimplifiedLayerNormalization", [*norm.add.inputs, norm.weight], made, contrib=True, epsilon=norm.eps)
    total.replace_all_uses_with(made[3])
    norm.out.replace_all_uses_with(made[0])


def _sort_at_entry(graph: ir.Graph, pen: Pen, layers: Sequence[Attention]) -> None:
    """Sort what every token brings, and look the last real one up at the end."""
    order = layers[0].mask.order
    if any(a.mask.order is not order for a in layers) or not order.is_graph_input():
        raise Refused("tokens change places between layers")
    _last_real(graph, pen, order)
    seq = [value for value in graph.inputs if value.shape is not None and "seq" in map(str, value.shape)]
    moved = {value: ir.Value(name=f"{value.name}_sorted", shape=value.shape, type=value.type) for value in seq}
    for value, new in moved.items():
        value.replace_all_uses_with(new)
    rank = ir.Value(name="rank", shape=order.shape, type=order.type)
    pen("TopK", [order, pen("Shape", [order], start=1)], [moved[order], rank], axis=1, largest=0)
    index = pen("Unsqueeze", [rank, pen.ints(-1)])
    for value, new in moved.items():
        assert value.shape is not None
        if value is order:
            continue
        if str(value.shape[0]) == "batch":
            pen("GatherND", [value, index], [new], batch_dims=1)
        else:  # position ids, [3, batch, seq]
            by_token = pen("GatherND", [pen("Transpose", [value], perm=[1, 2, 0]), index], batch_dims=1)
            pen("Transpose", [by_token], [new], perm=[2, 0, 1])
    frames = _Frames(pen)
    for a in layers:
        mask = Mask(moved[order], a.mask.past, a.mask.total, a.mask.node)
        q, k = frames.rotated(a, a.q, mask), frames.rotated(a, a.k, mask)
        out = _attend(pen, a, [q, k, _flat(pen, a.v), *(a.past or ()), *frames.lengths(mask)])
        a.out.replace_all_uses_with(out)
        for past in a.past or ():
            assert past.shape is not None
            length = str(past.shape[2]).replace("past", CAPACITY)
            past.shape = ir.Shape([past.shape[0], past.shape[1], length, past.shape[3]])


def _sort_around(graph: ir.Graph, pen: Pen, layers: Sequence[Attention]) -> None:
    """Sort queries, keys and values for the attention alone, and put its result back."""
    frames = _Frames(pen)
    for a in layers:
        there, back = frames.permutation(a.mask)
        q, k = frames.rotated(a, a.q, a.mask), frames.rotated(a, a.k, a.mask)
        given = [pen("GatherND", [x, there], batch_dims=1) for x in (q, k, _flat(pen, a.v))]
        out = _attend(pen, a, [*given, None, None, *frames.lengths(a.mask)])
        a.out.replace_all_uses_with(pen("GatherND", [out, back], batch_dims=1))
    for mask in {id(a.mask.order): a.mask for a in layers}.values():
        found = [i for i, v in enumerate(graph.outputs) if v is mask.order or _copies(v, mask.order)]
        if not found:
            raise Refused("a reduction chooses what stays in the cache")
        old = graph.outputs[found[0]]
        name, old.name = old.name, f"{old.name}_plain"
        ranked = pen("GatherND", [mask.order, frames.permutation(mask)[0]], batch_dims=1)
        ranked.name, ranked.shape, ranked.type = name, old.shape, old.type
        graph.outputs[found[0]] = ranked


def _attend(pen: Pen, a: Attention, given: Sequence[ir.Value | None]) -> ir.Value:
    """GroupQueryAttention in place of one layer's. Where its present is the graph's, it takes the name over."""
    made = [ir.Value(name=None, type=a.out.type) for _ in range(3)]
    node = pen.node(
        "GroupQueryAttention", given, made, contrib=True, num_heads=static(a.q, 2), kv_num_heads=static(a.k, 2),
        scale=a.scale,
    )  # fmt: skip
    for old, new in zip(a.present, made[1:], strict=True):
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        if not old.is_graph_output():
            raise Refused("a reduction chooses what stays in the cache")
        assert old.shape is not None
        graph.outputs[graph.outputs.index(old)] = new
        new.name, old.name = old.name, f"{old.name}_plain"
        new.shape = ir.Shape([*old.shape[:2], None, old.shape[3]])
    return made[0]


def _last_real(graph: ir.Graph, pen: Pen, order: ir.Value) -> None:
    """The final norm takes the last real token, wherever that is now."""
    found = [n for n in graph if n.op_type == "Gather" and n.attributes.get_int("axis", 0) == 1 and _is_last(n)]
    if len(found) != 1:
        raise Refused("it is not clear which node takes the last token")
    real = pen("Cast", [pen("Less", [order, pen.integer(PAD)])], to=ir.DataType.INT64.value)
    count = pen("ReduceSum", [real, pen.ints(1)], keepdims=1)
    last = pen("Max", [pen("Sub", [count, pen.ints(1)]), pen.ints(0)])
    (node,) = found
    node.outputs[0].replace_all_uses_with(pen("GatherND", [node.inputs[0], last], batch_dims=1))


def _is_last(node: ir.Node) -> bool:
    index = node.inputs[1]
    return index is not None and index.const_value is not None and bool((index.const_value.numpy() == -1).all())


def _check_cache(graph: ir.Graph, layers: Sequence[Attention]) -> None:
    """Where cached tokens stand is this flavour's own business."""
    if layers[0].past is None:
        return
    for a in layers:
        for value in a.past or ():
            for node in value.consumers():
                of_batch = node.op_type == "Shape" and node.attributes.get_int("end", 9) == 1
                if node.op_type != "GroupQueryAttention" and not of_batch:
                    raise Refused(f"`{node.name}` reads the cache")
        if a.mask.node.graph is not None:
            raise Refused("something else than attention reads the mask")


class _Frames:
    """What the layers of a KV group share, drawn once."""

    def __init__(self, pen: Pen) -> None:
        self._pen = pen
        self._lengths: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._permutations: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._rotations: dict[int, tuple[ir.Value, ir.Value, ir.Value]] = {}

    def rotated(self, a: Attention, x: ir.Value, mask: Mask) -> ir.Value:
        """x [batch, seq, heads, head_dim] → rotated [batch, seq, heads * head_dim]."""
        pen = self._pen
        if id(a.cos) not in self._rotations:  # every token has a row of its own in the table of angles
            rows = pen.ints(-1, static(a.cos, 3))
            numbers = pen("Range", [pen.integer(0), pen("Size", [mask.order]), pen.integer(1)])
            places = pen("Reshape", [numbers, pen("Shape", [mask.order])])
            self._rotations[id(a.cos)] = places, pen("Reshape", [a.cos, rows]), pen("Reshape", [a.sin, rows])
        return pen("RotaryEmbedding", [_flat(pen, x), *self._rotations[id(a.cos)]], contrib=True)

    def lengths(self, mask: Mask) -> tuple[ir.Value, ir.Value]:
        """int32 [batch], tokens of every row less one; int32 [1], tokens of all there may be."""
        pen = self._pen
        if id(mask.order) + id(mask.past) not in self._lengths:
            seq = pen("Cast", [pen("Shape", [mask.order], start=1)], to=ir.DataType.INT32.value)
            new = pen(
                "Cast", [pen("Sub", [pen("Shape", [mask.order], start=1), pen.ints(1)])], to=ir.DataType.INT32.value
            )
            if mask.past is None:
                found = pen("Expand", [new, pen("Shape", [mask.order], start=0, end=1)]), seq
            else:
                real = pen("Cast", [pen("Less", [mask.past, pen.integer(PAD)])], to=ir.DataType.INT32.value)
                total = pen("Cast", [pen("Shape", [mask.total], start=1)], to=ir.DataType.INT32.value)
                found = pen("Add", [pen("ReduceSum", [real, pen.ints(1)], keepdims=0), new]), total
            self._lengths[id(mask.order) + id(mask.past)] = found
        return self._lengths[id(mask.order) + id(mask.past)]

    def permutation(self, mask: Mask) -> tuple[ir.Value, ir.Value]:
        """Indices for GatherND into the order of the prompt, padding last, and back."""
        pen = self._pen
        if id(mask.order) not in self._permutations:
            seq = pen("Shape", [mask.order], start=1)
            found, values = [], mask.order
            for _ in range(2):
                rank = ir.Value(name=None)
                pen("TopK", [values, seq], [ir.Value(name=None), rank], axis=1, largest=0)
                found.append(pen("Unsqueeze", [rank, pen.ints(-1)]))
                values = rank
            self._permutations[id(mask.order)] = found[0], found[1]
        return self._permutations[id(mask.order)]


def _flat(pen: Pen, x: ir.Value) -> ir.Value:
    """[batch, seq, heads, head_dim] → [batch, seq, heads * head_dim], or what it was before it was split into heads."""
    node = x.producer()
    if node is not None and node.op_type == "Reshape":
        before = node.inputs[0]
        if before is not None and before.shape is not None and len(before.shape) == 3:
            return before
    return pen("Reshape", [x, pen.ints(0, 0, -1)])


def _copies(value: ir.Value, of: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Identity" and node.inputs[0] is of


FLAVOUR = Ort()
