"""ONNX Runtime on a CPU: attention as one operator over a cache that stays where it is.

`com.microsoft.GroupQueryAttention` takes the place of every layer's rotation, mask, scores and softmax, `SkipSimplifiedLayerNormalization` that of every sum of a residual and its norm. GroupQueryAttention leaves out what
lies above the diagonal, and it appends in place where a runner binds a layer's past and present to the same memory.

Requires of the plain graphs
    Float32, and every attention in the form of `exporter.nn.decoder_layer`: rotated in halves, causal by `order` alone. So no
    sliding windows, capped scores, sizes of merged tokens, INT8 caches, or cached tokens that differ from head to head. Nothing else
    looks at the cache. No two real tokens of a row have the same `order`.

Ensures
    The same results. A graph without a past keeps its inputs and outputs. One that goes on from a past leaves to the runner
    what is the same for all layers and known before it runs: its tokens come in the order of the prompt, padding last, and
    in place of `order` and `past_order_g` there are

    ============ ====================== =================================================================
    `last`       int64 [batch, 1]       where the last real token of every row stands, whose logits are wanted
    `places`     int64 [batch, seq]     all tokens counted, row by row
    `room`       int64 [4]              [0, 0, n, 0]: at least `total_g` less the tokens of all rows; see below
    `length_g`   int32 [batch]          real tokens of a row in group g's cache, and the new ones, less one
    `total_g`    int32 [1]              tokens in the cache of the longest row, and the new ones
    ============ ====================== =================================================================

    So the shapes of a step are those of the step before, and it has no node that only counts. Cached tokens of a row stand in
    the order of the prompt with nothing between them: where rows are padded, what lies behind a row's real tokens means
    nothing, and the next token overwrites it. `past_key_i` and `past_value_i` may be longer than what they hold (their axis is
    called a *capacity*). `exporter.backends._ort_append` runs such a graph as if it were the plain one.

GroupQueryAttention knows tokens by where they stand, so they are sorted: by the runner; or around every attention where a
reduction's nodes want visual tokens in front (a prefill graph of its own). Several tokens of several rows are more than it takes
behind a past: rows have to be run one after another.

It rotates, too, and is given projected queries, keys and values as the one matrix makes them. Its kernel asks for a table of at least as
many rows as there are tokens in all, and takes a token's row from `position_ids`; of a first prompt it looks at the first of those
only, and goes on from there, for every row of a batch (`group_query_attention.cc`, ONNX Runtime 1.31). So tables, `cos_0` and `sin_0`
float32 [rows, head_dim / 2], are inputs, and `position_ids` are `places` in them: the runner lays a table out for a run's own tokens in
the order in which they come, whatever their positions are, or for many steps at once. That is exact as long as the rows of a
first prompt have the same positions; where they have not, they have to be run one after another, too. What makes tables of
positions is a model of its own in the graph's metadata (`ANGLES`). Heads whose size is no multiple of 16 GroupQueryAttention does not rotate: `RotaryEmbedding`
does.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence

import onnx_ir as ir

from exporter.flavours._contract import ANGLES, CAPACITY, COS, LAST, LENGTH, PLACES, SIN, TOTAL, Flavour, Refused
from exporter.flavours._pen import Pen
from exporter.flavours._plain import Attention, Mask, SkipNorm, attention, skip_norm, static

ROTATED = 16
"""GroupQueryAttention rotates heads of multiples of this size."""


class Ort(Flavour):
    backend, places_shared = "ort", False

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
            _take_early(graph, lambda x: pen("Gather", [x, pen.integer(-1)], axis=1))
        else:
            last = _append(model, pen, layers)
            _take_early(graph, lambda x: pen("GatherND", [x, last], batch_dims=1))
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


def _append(model: ir.Model, pen: Pen, layers: Sequence[Attention]) -> ir.Value:
    """Attend to a cache that the runner keeps: it sorts the tokens, counts them, and draws their angles. Returns the place of the
    last token int64 [batch, 1]."""
    graph, order = model.graph, layers[0].mask.order
    if any(a.mask.order is not order or a.mask.past is None for a in layers) or not order.is_graph_input():
        raise Refused("tokens change places between layers")
    int64, int32 = (ir.TensorType(kind) for kind in (ir.DataType.INT64, ir.DataType.INT32))
    last, places = _input(graph, LAST, ["batch", 1], int64), _input(graph, PLACES, ["batch", "seq"], int64)
    tables, groups = _tables(model, pen, layers), dict[ir.Value, tuple[ir.Value, ir.Value]]()
    inside = all(static(a.q, 3) % ROTATED == 0 for a in layers)
    for a in layers:
        past, total = a.mask.past, a.mask.total
        assert past is not None and past.name is not None
        if past not in groups:
            group = past.name.removeprefix("past_order_")
            groups[past] = _input(graph, LENGTH + group, ["batch"], int32), _input(graph, TOTAL + group, [1], int32)
            for output in [v for v in graph.outputs if v is total or _copies(v, total)]:
                graph.outputs.remove(output)
        before = [*(a.past or ()), *groups[past]]
        if inside:
            out = _attend(pen, a, [*_projected(pen, a), *before, *tables[a.cos], places], do_rotary=1)
        else:
            out = _attend(pen, a, [*_rotated(pen, a, places, tables[a.cos]), _flat(pen, a.v), *before])
        a.out.replace_all_uses_with(out)
        for value in a.past or ():
            assert value.shape is not None
            value.shape = ir.Shape([*value.shape[:2], str(value.shape[2]).replace("past", CAPACITY), value.shape[3]])
    return last


def _tables(model: ir.Model, pen: Pen, layers: Sequence[Attention]) -> dict[ir.Value, tuple[ir.Value, ir.Value]]:
    """Per cos of a layer, the inputs for its cos and sin; what makes them of positions moves from the graph into its metadata."""
    graph, made, found = model.graph, list[ir.Value](), dict[ir.Value, tuple[ir.Value, ir.Value]]()
    for a in layers:
        if a.cos in found:
            continue
        half, kind = static(a.cos, 3), ir.TensorType(ir.DataType.FLOAT)
        names = [f"{name}{len(found)}" for name in (COS, SIN)]
        for name, value in zip(names, (a.cos, a.sin), strict=True):
            flat = pen("Reshape", [value, pen.ints(-1, half)])
            flat.name, flat.type, flat.shape = f"{ANGLES}_{name}", kind, ir.Shape(["tokens", half])
            made.append(flat)
        cos, sin = (_input(graph, name, ["rows", half], kind) for name in names)
        found[a.cos] = cos, sin
    positions = next(v for v in graph.inputs if v.name == "position_ids")
    graph.sort()
    try:
        angles = ir.convenience.extract(graph, [positions], made)
    except ValueError as e:
        raise Refused(f"what is rotated by depends on more than positions: {e}") from e
    for name in sorted(angles.initializers):  # `extract` has them in a set's order
        angles.register_initializer(angles.initializers.pop(name))
    for value in angles.outputs:
        value.name = (value.name or "").removeprefix(f"{ANGLES}_")
    kept = ir.external_data.load_to_model(ir.Model(angles, ir_version=model.ir_version))
    model.metadata_props[ANGLES] = base64.b64encode(ir.to_proto(kept).SerializeToString()).decode()
    return found


def _input(graph: ir.Graph, name: str, shape: Sequence[int | str], kind: ir.TensorType) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=kind)
    graph.inputs.append(value)
    return value


def _sort_around(graph: ir.Graph, pen: Pen, layers: Sequence[Attention]) -> None:
    """Sort queries, keys and values for the attention alone, and put its result back."""
    frames = _Frames(pen)
    for a in layers:
        there, back = frames.permutation(a.mask)
        rotated = _rotated(pen, a, frames.places(a.mask), frames.table(a))
        given = [pen("GatherND", [x, there], batch_dims=1) for x in (*rotated, _flat(pen, a.v))]
        out = _attend(pen, a, [*given, None, None, *frames.lengths(a.mask)])
        plain = pen("GatherND", [out, back], batch_dims=1)
        plain.type, plain.shape = a.out.type, a.out.shape
        a.out.replace_all_uses_with(plain)
    for mask in {id(a.mask.order): a.mask for a in layers}.values():
        found = [i for i, v in enumerate(graph.outputs) if v is mask.order or _copies(v, mask.order)]
        if not found:
            raise Refused("a reduction chooses what stays in the cache")
        old = graph.outputs[found[0]]
        name, old.name = old.name, f"{old.name}_plain"
        ranked = pen("GatherND", [mask.order, frames.permutation(mask)[0]], batch_dims=1)
        ranked.name, ranked.shape, ranked.type = name, old.shape, old.type
        graph.outputs[found[0]] = ranked


def _attend(pen: Pen, a: Attention, given: Sequence[ir.Value | None], do_rotary: int = 0) -> ir.Value:
    """GroupQueryAttention in place of one layer's. Where its present is the graph's, it takes the name over."""
    made = [ir.Value(name=None, type=a.out.type) for _ in range(3)]
    made[0].shape = a.out.shape
    node = pen.node(
        "GroupQueryAttention", given, made, contrib=True, num_heads=static(a.q, 2), kv_num_heads=static(a.k, 2),
        scale=a.scale, do_rotary=do_rotary,
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


def _take_early(graph: ir.Graph, take: Callable[[ir.Value], ir.Value]) -> None:
    """Take the last token as soon as nobody wants the others: behind the last attention. What follows, each token by itself, is a
    large part of a layer. take: [batch, seq, dim] → [batch, dim]."""
    graph.sort()
    gather = _last_token(graph)
    alone = {gather}
    for node in reversed(graph):
        read = [user for value in node.outputs for user in value.consumers()]
        shown = any(value.is_graph_output() for value in node.outputs)
        if read and not shown and alone.issuperset(read) and _each_by_itself(node):
            alone.add(node)
    taken: dict[ir.Value, ir.Value] = {}
    for node in [n for n in graph if n in alone and n is not gather]:  # a set's order is another one in every process
        for i, value in enumerate(node.inputs):
            if value is not None and _of_tokens(value) and value.producer() not in alone:
                if value not in taken:
                    taken[value] = one = take(value)
                    assert value.shape is not None
                    one.type, one.shape = value.type, ir.Shape([value.shape[0], value.shape[2]])
                node.replace_input_with(i, taken[value])
        for value in node.outputs:
            assert value.shape is not None
            value.shape = ir.Shape([value.shape[0], *value.shape[2:]])
    (x, _), (out,) = gather.inputs, gather.outputs
    assert x is not None
    out.replace_all_uses_with(x if x.producer() in alone else take(x))


EACH_BY_ITSELF = frozenset(
    "Add Cast Div Erf LayerNormalization MatMul Mul Neg Pow ReduceMean Reciprocal Relu Sigmoid Sqrt Sub Tanh".split()
)
"""What computes a token without looking at others, or at how many axes there are in front."""


def _each_by_itself(node: ir.Node) -> bool:
    if node.op_type not in EACH_BY_ITSELF or not all(map(_of_tokens, node.outputs)):
        return False
    shapes = [value.shape for value in node.inputs if value is not None]
    # Blocks of channels, where zero points are published, have 4 axes.
    if any(shape is None or len(shape) > 3 for shape in shapes):
        return False
    if node.op_type == "ReduceMean":
        axes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        return axes is not None and axes.numpy().tolist() == [-1]
    return node.attributes.get_int("axis", -1) == -1


def _of_tokens(value: ir.Value) -> bool:
    """Whether it is [batch, seq, dim]."""
    return value.const_value is None and value.shape is not None and len(value.shape) == 3


def _last_token(graph: ir.Graph) -> ir.Node:
    """The node in front of the final norm that takes the last token."""
    found = [n for n in graph if n.op_type == "Gather" and n.attributes.get_int("axis", 0) == 1 and _is_last(n)]
    if len(found) != 1:
        raise Refused("it is not clear which node takes the last token")
    return found[0]


def _is_last(node: ir.Node) -> bool:
    index = node.inputs[1]
    return index is not None and index.const_value is not None and bool((index.const_value.numpy() == -1).all())


def _check_cache(graph: ir.Graph, layers: Sequence[Attention]) -> None:
    """Where cached tokens stand is this flavour's own business: nothing else may look at it, and the graph no longer takes
    and gives it."""
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
    for value in [
        v for v in graph.inputs if v.name in ("order", "position_ids") or (v.name or "").startswith("past_order_")
    ]:
        if value.consumers() or value.is_graph_output():
            raise Refused(f"something else than attention reads `{value.name}`")
        graph.inputs.remove(value)
    for value in graph.outputs:
        if value.name != "logits" and not (value.name or "").startswith(("present_key_", "present_value_")):
            raise Refused(f"it also returns `{value.name}`")


class _Frames:
    """What the layers of a KV group share in a graph without a past, drawn once."""

    def __init__(self, pen: Pen) -> None:
        self._pen = pen
        self._tables: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._places: dict[ir.Value, ir.Value] = {}
        self._lengths: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._permutations: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def table(self, a: Attention) -> tuple[ir.Value, ir.Value]:
        """cos and sin [tokens, head_dim / 2], a row for each."""
        pen = self._pen
        if a.cos not in self._tables:
            rows = pen.ints(-1, static(a.cos, 3))
            self._tables[a.cos] = pen("Reshape", [a.cos, rows]), pen("Reshape", [a.sin, rows])
        return self._tables[a.cos]

    def places(self, mask: Mask) -> ir.Value:
        """int64 [batch, seq], counting all tokens."""
        pen = self._pen
        if mask.order not in self._places:
            numbers = pen("Range", [pen.integer(0), pen("Size", [mask.order]), pen.integer(1)])
            self._places[mask.order] = pen("Reshape", [numbers, pen("Shape", [mask.order])])
        return self._places[mask.order]

    def lengths(self, mask: Mask) -> tuple[ir.Value, ir.Value]:
        """int32 [batch], tokens of every row less one; int32 [1], tokens of all there may be."""
        pen = self._pen
        if mask.order not in self._lengths:
            seq = pen("Shape", [mask.order], start=1)
            less = pen("Cast", [pen("Sub", [seq, pen.ints(1)])], to=ir.DataType.INT32.value)
            each = pen("Expand", [less, pen("Shape", [mask.order], start=0, end=1)])
            self._lengths[mask.order] = each, pen("Cast", [seq], to=ir.DataType.INT32.value)
        return self._lengths[mask.order]

    def permutation(self, mask: Mask) -> tuple[ir.Value, ir.Value]:
        """Indices for GatherND into the order of the prompt, padding last, and back."""
        pen = self._pen
        if mask.order not in self._permutations:
            seq = pen("Shape", [mask.order], start=1)
            found, values = [], mask.order
            for _ in range(2):
                rank = ir.Value(name=None)
                pen("TopK", [values, seq], [ir.Value(name=None), rank], axis=1, largest=0)
                found.append(pen("Unsqueeze", [rank, pen.ints(-1)]))
                values = rank
            self._permutations[mask.order] = found[0], found[1]
        return self._permutations[mask.order]


def _rotated(pen: Pen, a: Attention, places: ir.Value, table: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
    """Queries and keys [batch, seq, heads * head_dim], rotated. places: int64 [batch, seq], a token's row."""
    q, k = (pen("RotaryEmbedding", [_flat(pen, x), places, *table], contrib=True) for x in (a.q, a.k))
    return q, k


def _projected(pen: Pen, a: Attention) -> tuple[ir.Value | None, ...]:
    """Queries, keys and values before the rotation: behind one another, with nothing for the other two, where they were made
    so and nothing, such as a norm, came between."""
    q, k, v = (_flat(pen, x) for x in (a.q, a.k, a.v))
    split = q.producer()
    if split is not None and split.op_type == "Split" and tuple(split.outputs) == (q, k, v):
        return split.inputs[0], None, None
    return q, k, v


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
