"""The three graphs of `genai`, made of ours.

Behind the embeddings of a token stand *columns*: what genai would count, subtracted from what it is here.

======== ======================================= ==================================================================
column   the token's … less its place            differs where
======== ======================================= ==================================================================
0        order                                   two tokens share one (CLS and the first patch)
1 to a   position id, per axis                   tokens were dropped and the others keep their positions; M-RoPE
a + 1    order of the last token it sees         tokens see ahead (only if the model takes `reach`)
======== ======================================= ==================================================================

A token's *place* is its number in genai's sequence, from 0 on. Only differences of positions matter to a rotation, so they are counted
from the end: text behind the images has its place as position, and what is before it moves down. So generated tokens, which
the embedding model sees one at a time, have columns of zeros, and nothing has to be remembered. Columns are float32, in which these
numbers are exact.

Kept tokens are put in the order of the prompt here, as genai's sequence is the prompt.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter.flavours._contract import ANGLES, CAPACITY, LAST, LENGTH, PLACES, TOTAL
from exporter.flavours._pen import Pen
from exporter.graphset import GraphSet, VisualLayout

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def columns(graphs: GraphSet) -> int:
    """How many there are."""
    return 1 + graphs.text.position_axes + graphs.reaches


def as_bytes(model: ir.Model) -> bytes:
    """Serialised; weights stay where they are."""
    found: bytes = ir.to_proto(model).SerializeToString()
    return found


def vision(graphs: GraphSet, folder: Path) -> ir.Model:
    """pixel_values float32 [1, frames, 3, height, width] → image_features float32 [kept, width + columns]."""
    model = ir.load(folder / graphs.files["vision"])
    graph, pen = model.graph, Pen(model, "genai")
    signals = {value.name: value for value in graph.outputs}
    made = _append(graph, ir.load(folder / graphs.files["reduce"]).graph, signals, "reduce")
    _as_float32(graph, "pixel_values", pen)
    kept, width = graphs.visual.kept, graphs.text.width
    embeds = pen("Cast", [pen("Reshape", [made["visual_embeds"], pen.ints(kept, width)])], to=FLOAT)
    index = pen("Reshape", [made["index"], pen.ints(kept)])
    if graphs.visual.policy == "keep":
        rank, behind = _kept(graphs, index, pen)
        embeds = pen("Gather", [embeds, rank], axis=0)
    else:
        behind = [pen.constant(np.zeros(kept, np.int64))] * (1 + graphs.text.position_axes)
        if graphs.reaches:
            behind = [*behind, pen.constant(_last(graphs) - np.arange(kept))]
    features = pen("Concat", [embeds, _side_by_side(behind, pen)], axis=1)
    features.name = "image_features"
    features.type, features.shape = ir.TensorType(FLOAT), ir.Shape([kept, width + columns(graphs)])
    graph.outputs[:] = [features]
    graph.name = "genai_vision"
    pen.done()
    return model


def _kept(graphs: GraphSet, index: ir.Value, pen: Pen) -> tuple[ir.Value, list[ir.Value]]:
    """Rows in the order of the prompt int64 [kept], and the columns of what stands there then, each int64 [kept].

    As `exporter.runtime.sequence` places them, per placeholder."""
    visual, axes, kept = graphs.visual, graphs.text.position_axes, graphs.visual.kept
    each, share = visual.total // visual.placeholders, kept // visual.placeholders
    patch = pen("GreaterOrEqual", [index, pen.integer(0)])
    real = pen("Max", [index, pen.integer(0)])
    holder, offset = pen("Div", [real, pen.integer(each)]), pen("Mod", [real, pen.integer(each)])
    table = np.asarray(visual.ids, np.int64).reshape(each, axes)
    ids = [
        pen("Where", [patch, pen("Gather", [pen.constant(axis), offset]), pen.integer(0)])
        for axis in np.ascontiguousarray(table.T)
    ]
    within = ids[0] if axes == 1 else pen("Where", [patch, offset, pen.integer(0)])
    number = pen("Add", [pen("Mul", [holder, pen.integer(each)]), within])
    order, rank = ir.Value(name="genai/order"), ir.Value(name="genai/rank")
    pen("TopK", [number, pen.ints(kept)], [order, rank], axis=0, largest=0)

    places = np.arange(kept)
    earlier = pen(
        "Less", [pen("Unsqueeze", [order, pen.ints(0)]), pen("Unsqueeze", [order, pen.ints(1)])]
    )  # [kept, kept]: is the second before the first?
    first = pen("ReduceSum", [pen("Cast", [earlier], to=INT64), pen.ints(1)], keepdims=0)
    found = [pen("Sub", [first, pen.constant(places)])]
    # From the end: what was dropped of this placeholder's and the later ones' positions.
    holders = places // share
    down = places % share + (visual.placeholders - holders) * _dropped(visual)
    found += [pen("Sub", [pen("Gather", [axis, rank]), pen.constant(down)]) for axis in ids]
    if graphs.reaches:
        last = pen("Gather", [first, pen.constant(_last(graphs))])
        found.append(pen("Sub", [last, pen.constant(places)]))
    return rank, found


def _dropped(visual: VisualLayout) -> int:
    """Positions that a placeholder spans beyond the tokens it keeps."""
    return visual.span - visual.kept // visual.placeholders if visual.policy == "keep" else 0


def _last(graphs: GraphSet) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Place of the last token of each one's image [kept]."""
    share = graphs.visual.kept // graphs.visual.placeholders
    return (np.arange(graphs.visual.kept) // share + 1) * share - 1


def embedding(graphs: GraphSet, folder: Path) -> ir.Model:
    """input_ids int64 [batch, seq] and image_features [image tokens, width + columns] → inputs_embeds [batch, seq, width + columns].

    image_features are empty where the prompt has none, and while decoding. The table is the folder's own, by reference.
    """
    visual, text, more = graphs.visual, graphs.text, columns(graphs)
    ids = _value("input_ids", INT64, "batch", "seq")
    features = _value("image_features", FLOAT, "image_tokens", text.width + more)
    graph = ir.Graph([ids, features], [], nodes=[], opset_imports={"": 21}, name="genai_embedding")
    model = ir.Model(graph, ir_version=10, producer_name="edgetrim")
    pen = Pen(model, "genai")
    table = _table(graphs, folder)
    graph.initializers["embedding"] = table

    count = pen("Shape", [features], start=0, end=1)
    # Without images it is a word: a model may say it.
    image = pen("And", [pen("Equal", [ids, pen.integer(text.image_token)]), pen("Greater", [count, pen.integer(0)])])
    words = pen("Cast", [pen("Gather", [table, pen("Where", [image, pen.integer(0), ids])])], to=FLOAT)
    seen = pen("CumSum", [pen("Cast", [image], to=INT64), pen.integer(1)])
    # Placeholders that are still to come move the text before them down.
    share = pen.integer(visual.kept // visual.placeholders if visual.policy == "keep" else visual.kept)
    ahead = pen("Sub", [pen("Div", [seen, share]), pen("Div", [count, share])])
    moved = pen("Mul", [ahead, pen.integer(_dropped(visual))])
    none = pen("Mul", [seen, pen.integer(0)])
    behind = [none, *[moved] * text.position_axes, *[none] * graphs.reaches]
    planes = pen("Concat", [pen("Shape", [ids]), pen.ints(text.width - text.hidden)], axis=0)
    zeros = pen("Expand", [pen.constant(np.zeros((1, 1, 1), np.float32)), planes])
    written = pen("Concat", [words, zeros, _side_by_side(behind, pen)], axis=-1)
    # A row of zeros in front, for words. An image token too many is an index too large, which is an error there.
    rows = pen("Concat", [pen.constant(np.zeros((1, text.width + more), np.float32)), features], axis=0)
    shown = pen("Gather", [rows, pen("Where", [image, seen, pen.integer(0)])], axis=0)
    embeds = pen("Where", [pen("Unsqueeze", [image, pen.ints(-1)]), shown, written])
    if visual.sees == "prompt":  # its last token, which only this graph can count
        length = pen("Squeeze", [pen("Shape", [ids], start=1, end=2)])
        rest = pen("Range", [pen("Sub", [length, pen.integer(1)]), pen.integer(-1), pen.integer(-1)])
        prompt = pen("Min", [count, pen.ints(1)])
        reach = _side_by_side([pen("Add", [none, pen("Mul", [rest, prompt])])], pen)
        embeds = pen("Concat", [_slice(embeds, 0, text.width + more - 1, pen), reach], axis=-1)
    embeds.name, embeds.type = "inputs_embeds", ir.TensorType(FLOAT)
    embeds.shape = ir.Shape(["batch", "seq", text.width + more])
    graph.outputs.append(embeds)
    pen.done()
    return model


def decoder(graphs: GraphSet, folder: Path) -> ir.Model:
    """inputs_embeds [batch, seq, width + columns], attention_mask int64 [batch, past + seq] and position_ids int64 [batch, seq], which
    count, → logits [batch, 1, vocab]. Caches as they are."""
    model = ir.load(folder / graphs.files["decode"])
    graph, pen = model.graph, Pen(model, "genai")
    old = {value.name: value for value in graph.inputs}
    width, axes = graphs.text.width, graphs.text.position_axes
    embeds = _value("inputs_embeds", FLOAT, "batch", "seq", width + columns(graphs))
    mask, places = _value("attention_mask", INT64, "batch", "total"), _value("position_ids", INT64, "batch", "seq")

    kind = old["inputs_embeds"].dtype
    assert kind is not None
    tail = pen("Cast", [_slice(embeds, width, width + columns(graphs), pen)], to=INT64)
    behind = [pen("Squeeze", [_slice(tail, i, i + 1, pen), pen.ints(-1)]) for i in range(columns(graphs))]
    here = [pen("Add", [places, column]) for column in behind]
    positions = (
        here[1]
        if axes == 1
        else pen("Concat", [pen("Unsqueeze", [v, pen.ints(0)]) for v in here[1 : 1 + axes]], axis=0)
    )
    ours = {"inputs_embeds": pen("Cast", [_slice(embeds, 0, width, pen)], to=kind)}
    if LAST in old:
        tables = _append(graph, _angles(model), {"position_ids": positions}, ANGLES)
        ours |= _counted(mask, places, tables, pen)
    else:
        ours |= {"position_ids": positions, "order": here[0], "past_order_0": _past_order(mask, places, pen)}
    if graphs.reaches:
        ours["reach"] = here[-1]
    for name, value in ours.items():
        value.type, value.shape = old[name].type, old[name].shape
        old[name].replace_all_uses_with(value, replace_graph_outputs=True)
    rest = [value for value in graph.inputs if value.name not in ours]
    graph.inputs[:] = [embeds, mask, places, *rest]

    logits, *presents = [v for v in graph.outputs if not (v.name or "").startswith("present_order_")]
    out = pen("Unsqueeze", [logits, pen.ints(1)])
    assert logits.shape is not None
    out.type, out.shape = logits.type, ir.Shape([logits.shape[0], 1, logits.shape[1]])
    out.name, logits.name = logits.name, "genai/logits"
    graph.outputs[:] = [out, *presents]
    graph.name = "genai_decoder"
    pen.done()
    return model


def _angles(model: ir.Model) -> ir.Graph:
    """Taken out of a graph's metadata: positions → what its tokens are rotated by."""
    from onnx import ModelProto

    found: ir.Model = ir.from_proto(ModelProto.FromString(base64.b64decode(model.metadata_props.pop(ANGLES))))
    return found.graph


def grows_in_place(model: ir.Model) -> bool:
    """Whether a decoder's past and present may be the same memory, longer than what it holds."""
    past = next(value for value in model.graph.inputs if value.name == "past_key_0")
    assert past.shape is not None
    return str(past.shape[2]).startswith(CAPACITY)


def _past_order(mask: ir.Value, places: ir.Value, pen: Pen) -> ir.Value:
    """Places of the cached tokens int64 [batch, past]; the cache itself may be longer than that."""
    length = pen("Sub", [pen("Shape", [mask], start=1, end=2), pen("Shape", [places], start=1, end=2)])
    counted = pen("Range", [pen.integer(0), pen("Squeeze", [length]), pen.integer(1)])
    return pen("Expand", [counted, pen("Concat", [pen("Shape", [mask], start=0, end=1), length], axis=0)])


def _counted(mask: ir.Value, places: ir.Value, tables: Mapping[str, ir.Value], pen: Pen) -> dict[str, ir.Value]:
    """What a graph that appends to its cache in place wants to know (`exporter.flavours.ort`). genai's tokens come in the order of the
    prompt, and none is padding. tables: of their angles, a row for each; there have to be as many as tokens in all."""
    batch, seq = (pen("Shape", [places], start=axis, end=axis + 1) for axis in (0, 1))
    one, total = pen.ints(1), pen("Shape", [mask], start=1, end=2)
    numbers = pen("Range", [pen.integer(0), pen("Size", [places]), pen.integer(1)])
    less = pen("Cast", [pen("Sub", [total, one])], to=ir.DataType.INT32)
    none, room = pen.ints(0), pen("Sub", [total, pen("Reshape", [pen("Size", [places]), one])])
    behind = pen("Concat", [none, none, room, none], axis=0)
    return {
        **{name: pen("Pad", [table, behind]) for name, table in tables.items()},
        LAST: pen("Expand", [pen("Sub", [seq, one]), pen("Concat", [batch, one], axis=0)]),
        PLACES: pen("Reshape", [numbers, pen("Shape", [places])]),
        f"{LENGTH}0": pen("Expand", [less, batch]),
        f"{TOTAL}0": pen("Cast", [total], to=ir.DataType.INT32),
    }


def _append(graph: ir.Graph, other: ir.Graph, given: Mapping[str | None, ir.Value], scope: str) -> dict[str, ir.Value]:
    """Put another graph's nodes behind those of `graph`; its inputs are `given` by name. Returns its outputs by name."""
    outputs = {value.name or "": value for value in other.outputs}
    for value in other.inputs:
        value.replace_all_uses_with(given[value.name], replace_graph_outputs=True)
    nodes = list(other)
    other.outputs.clear()
    other.remove(nodes)
    for name in list(other.initializers):
        value = other.initializers.pop(name)
        value.name = f"{scope}/{name}"
        graph.initializers[value.name] = value
    for value in (value for node in nodes for value in node.outputs):
        value.name = f"{scope}/{value.name}"
    graph.extend(nodes)
    for domain, version in other.opset_imports.items():
        graph.opset_imports.setdefault(domain, version)
    return outputs


def _as_float32(graph: ir.Graph, name: str, pen: Pen) -> None:
    """An input in float32, whatever the graph computes in."""
    number = next(i for i, value in enumerate(graph.inputs) if value.name == name)
    old = graph.inputs[number]
    assert old.dtype is not None and old.shape is not None
    if old.dtype != FLOAT:
        new = _value(name, FLOAT, *old.shape)
        old.name = f"genai/{name}"
        old.replace_all_uses_with(pen("Cast", [new], to=old.dtype))
        graph.inputs[number] = new


def _table(graphs: GraphSet, folder: Path) -> ir.Value:
    """The embedding table, read from behind the header of its .npy file."""
    path = folder / graphs.embedding
    table = np.load(path, mmap_mode="r", allow_pickle=False)
    kind = ir.DataType.from_numpy(table.dtype)
    tensor = ir.ExternalTensor(
        graphs.embedding,
        table.offset,
        table.nbytes,
        kind,
        shape=ir.Shape(table.shape),
        name="embedding",
        base_dir=folder,
    )
    return ir.Value(name="embedding", shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)


def _value(name: str, kind: ir.DataType, *shape: Any) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))


def _slice(value: ir.Value, start: int, end: int, pen: Pen) -> ir.Value:
    """Of the last axis."""
    return pen("Slice", [value, pen.ints(start), pen.ints(end), pen.ints(-1)])


def _side_by_side(numbers: Sequence[ir.Value], pen: Pen) -> ir.Value:
    """Integers [..] → float32 [.., n]."""
    return pen("Cast", [pen("Concat", [pen("Unsqueeze", [v, pen.ints(-1)]) for v in numbers], axis=-1)], to=FLOAT)
