"""A model of a few hundred weights as ONNX graphs that keep the contract of `exporter.graphset`, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter.graphset import GraphSet, ImageSpec, TextSpec, VisualLayout

IMAGE, EOS = 3, 2
SIDE, PATCH = 8, 4  # pixels: an image is 2 x 2 patches
PATCHES = (SIDE // PATCH) ** 2
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 16, 4, 2, 8, 40, 2


class Graph:
    """Collects nodes and constants."""

    def __init__(self, half: bool = False, seed: int = 0) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.dtype = np.float16 if half else np.float32
        self.type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.random = np.random.default_rng(seed)

    def const(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, rows: int, columns: int) -> str:
        return self.const((self.random.standard_normal((rows, columns)) * 1.5 / np.sqrt(rows)).astype(self.dtype))

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        return self.ops(kind, *inputs, outs=[out or f"v{len(self.nodes)}"], **attributes)[0]

    def ops(self, kind: str, *inputs: str, outs: list[str], **attributes: Any) -> list[str]:
        self.nodes.append(helper.make_node(kind, list(inputs), outs, **attributes))
        return outs

    def save(self, path: Path, inputs: dict[str, Any], outputs: dict[str, Any]) -> Path:
        """Names to (type, shape)."""

        def values(given: dict[str, Any]) -> list[Any]:
            return [helper.make_tensor_value_info(name, *what) for name, what in given.items()]

        graph = helper.make_graph(self.nodes, path.stem, values(inputs), values(outputs), self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def vision(path: Path, half: bool = False) -> Path:
    """Patches as `hidden` [batch, frames, tokens, dim], and their brightness as `score`."""
    g, n = Graph(half, 1), SIDE // PATCH
    x = g.op("Reshape", "pixel_values", g.const(np.array([0, 0, 3, n, PATCH, n, PATCH])))
    x = g.op("Transpose", x, perm=[0, 1, 3, 5, 2, 4, 6])
    x = g.op("Reshape", x, g.const(np.array([0, 0, PATCHES, 3 * PATCH * PATCH])))
    g.op("MatMul", x, g.weight(3 * PATCH * PATCH, HIDDEN), out="hidden")
    g.op("ReduceMean", x, g.const(np.array([3])), keepdims=0, out="score")
    pixels = {"pixel_values": (g.type, ["batch", "frames", 3, SIDE, SIDE])}
    shape = ["batch", "frames", PATCHES]
    return g.save(path, pixels, {"hidden": (g.type, [*shape, HIDDEN]), "score": (g.type, shape)})


def reduce(path: Path, frames: int, keep: int, half: bool = False, guided: bool = False, sized: bool = False) -> Path:
    """Keeps the brightest patches, in their order. Guided, it adds the mean of the text to every token. Sized, every token
    stands for one and its brightness."""
    g, total = Graph(half, 2), frames * PATCHES
    hidden = g.op("Reshape", "hidden", g.const(np.array([0, total, HIDDEN])))
    score = g.op("Reshape", "score", g.const(np.array([0, total])))
    _, top = g.ops("TopK", score, g.const(np.array([keep])), outs=["best", "top"], axis=1)
    g.ops("TopK", top, g.const(np.array([keep])), outs=["index", "unused"], axis=1, largest=0)
    kept = g.op("GatherND", hidden, g.op("Unsqueeze", "index", g.const(np.array([2]))), batch_dims=1)
    inputs = {"hidden": (g.type, ["batch", frames, PATCHES, HIDDEN]), "score": (g.type, ["batch", frames, PATCHES])}
    if guided:
        mask = g.op("Unsqueeze", "text_mask", g.const(np.array([2])))
        words = g.op("ReduceSum", g.op("Mul", "text", mask), g.const(np.array([1])))
        kept = g.op("Add", kept, g.op("Div", words, g.op("ReduceSum", mask, g.const(np.array([1])))))
        inputs |= {"text": (g.type, ["batch", "text", HIDDEN]), "text_mask": (g.type, ["batch", "text"])}
    g.op("Identity", kept, out="visual_embeds")
    outputs = {"visual_embeds": (g.type, ["batch", keep, HIDDEN]), "index": (TensorProto.INT64, ["batch", keep])}
    if sized:
        g.op("Add", g.op("Abs", g.op("GatherElements", score, "index", axis=1)), g.const(g.dtype(1)), out="visual_size")
        outputs["visual_size"] = (g.type, ["batch", keep])
    return g.save(path, inputs, outputs)


def decoder(
    path: Path, past: bool = True, pruned: tuple[int, int] | None = None, axes: int = 1, half: bool = False,
    layers: int = LAYERS, hidden: int = HIDDEN, head_dim: int = HEAD_DIM, vocab: int = VOCAB, sized: bool = False,
) -> Path:  # fmt: skip
    """The language model.

    Args:
        past: takes a cache.
        pruned: (visual tokens, those that stay): every layer but the first is a KV group of its own cache length; without
            a cache (prefill) only the first visual tokens stay before the second layer.
    """
    g = Graph(half, 3)
    groups = [0] + [1 if pruned else 0] * (layers - 1)
    x, order, positions = "inputs_embeds", "order", "position_ids"
    outputs: dict[str, Any] = {"logits": (g.type, ["batch", vocab])}
    inputs: dict[str, Any] = {
        "inputs_embeds": (g.type, ["batch", "seq", hidden]),
        "position_ids": (TensorProto.INT64, [3] * (axes > 1) + ["batch", "seq"]),
        "order": (TensorProto.INT64, ["batch", "seq"]),
    }
    weights = [
        [g.weight(*shape) for shape in (
            (hidden, HEADS * head_dim), (hidden, KV_HEADS * head_dim), (hidden, KV_HEADS * head_dim),
            (HEADS * head_dim, hidden), (hidden, 2 * hidden), (2 * hidden, hidden),
        )] for _ in range(layers)
    ]  # fmt: skip
    head = g.weight(hidden, vocab)
    for layer, (wq, wk, wv, wo, up, down) in enumerate(weights):
        group = groups[layer]
        if pruned and not past and layer == 1:
            x, order = (_drop(g, value, 1, *pruned) for value in (x, order))
            positions = _drop(g, positions, 1 if axes == 1 else 2, *pruned)
            g.op("Expand", g.const(np.arange(pruned[1])[None]), _batch(g, order), out="kept_1")
            outputs["kept_1"] = (TensorProto.INT64, ["batch", pruned[1]])
        if layer in (0, 1) and f"present_order_{group}" not in outputs:
            cos, sin = _angles(g, positions, axes, head_dim)
            everything = f"present_order_{group}"
            if past:
                g.op("Concat", f"past_order_{group}", order, axis=1, out=everything)
                inputs[f"past_order_{group}"] = (TensorProto.INT64, ["batch", f"past{group}"])
            else:
                g.op("Identity", order, out=everything)
            outputs[everything] = (TensorProto.INT64, ["batch", f"total{group}"])
            rows = g.op("Unsqueeze", order, g.const(np.array([1, 3])))
            seen = g.op("LessOrEqual", g.op("Unsqueeze", everything, g.const(np.array([1, 2]))), rows)
            counted = g.const(g.dtype(0))
            if sized:
                inputs["size"] = (g.type, ["batch", "seq"])
                inputs[f"past_size_{group}"] = (g.type, ["batch", f"past{group}"])
                outputs[f"present_size_{group}"] = (g.type, ["batch", f"total{group}"])
                g.op("Concat", f"past_size_{group}", "size", axis=1, out=f"present_size_{group}")
                sizes = g.op("Unsqueeze", f"present_size_{group}", g.const(np.array([1, 2])))
                counted = g.op("Log", sizes)
            bias = g.op("Where", seen, counted, g.const(g.dtype(-30000)))
        q = _rotate(g, _heads(g, g.op("MatMul", x, wq), HEADS, head_dim), cos, sin)
        k = _rotate(g, _heads(g, g.op("MatMul", x, wk), KV_HEADS, head_dim), cos, sin)
        v = _heads(g, g.op("MatMul", x, wv), KV_HEADS, head_dim)
        for name, value in (("key", k), ("value", v)):
            present = f"present_{name}_{layer}"
            if past:
                g.op("Concat", f"past_{name}_{layer}", value, axis=2, out=present)
                inputs[f"past_{name}_{layer}"] = (g.type, ["batch", KV_HEADS, f"past{group}", head_dim])
            else:
                g.op("Identity", value, out=present)
            outputs[present] = (g.type, ["batch", KV_HEADS, f"total{group}", head_dim])
        k, v = (_repeat(g, f"present_{name}_{layer}", head_dim) for name in ("key", "value"))
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = g.op("Add", g.op("Mul", scores, g.const(g.dtype(head_dim**-0.5))), bias)
        mixed = g.op("Transpose", g.op("MatMul", g.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        mixed = g.op("Reshape", mixed, g.const(np.array([0, 0, HEADS * head_dim])))
        x = g.op("Add", x, g.op("MatMul", mixed, wo))
        x = g.op("Add", x, g.op("MatMul", g.op("Tanh", g.op("MatMul", x, up)), down))
    g.op("MatMul", g.op("Gather", x, g.const(np.array(-1)), axis=1), head, out="logits")
    return g.save(path, inputs, outputs)


def _angles(g: Graph, positions: str, axes: int, head_dim: int) -> tuple[str, str]:
    """Every axis turns by its own speed, so that a mixed-up axis shows."""
    parts = g.op("Cast", positions, to=g.type)
    if axes > 1:
        speeds = g.const(np.array([1, 0.5, 0.25], g.dtype)[:, None, None])
        parts = g.op("ReduceSum", g.op("Mul", parts, speeds), g.const(np.array([0])), keepdims=0)
    frequencies = g.const((0.3 ** np.arange(head_dim // 2)).astype(g.dtype))
    angles = g.op("Mul", g.op("Unsqueeze", parts, g.const(np.array([1, 3]))), frequencies)
    return g.op("Cos", angles), g.op("Sin", angles)


def _rotate(g: Graph, x: str, cos: str, sin: str) -> str:
    a, b = g.ops("Split", x, outs=[f"{x}a", f"{x}b"], axis=-1, num_outputs=2)
    one = g.op("Sub", g.op("Mul", a, cos), g.op("Mul", b, sin))
    two = g.op("Add", g.op("Mul", a, sin), g.op("Mul", b, cos))
    return g.op("Concat", one, two, axis=-1)


def _heads(g: Graph, x: str, heads: int, head_dim: int) -> str:
    return g.op("Transpose", g.op("Reshape", x, g.const(np.array([0, 0, heads, head_dim]))), perm=[0, 2, 1, 3])


def _repeat(g: Graph, x: str, head_dim: int) -> str:
    x = g.op("Expand", g.op("Unsqueeze", x, g.const(np.array([2]))), g.const(np.array([1, 1, HEADS // KV_HEADS, 1, 1])))
    return g.op("Reshape", x, g.const(np.array([0, HEADS, -1, head_dim])))


def _drop(g: Graph, x: str, axis: int, visual: int, stay: int) -> str:
    def cut(first: int, last: int) -> str:
        return g.op("Slice", x, *(g.const(np.array([n])) for n in (first, last, axis)))

    return g.op("Concat", cut(0, stay), cut(visual, 2**31), axis=axis)


def _batch(g: Graph, order: str) -> str:
    return g.op("Concat", g.op("Shape", order, end=1), g.const(np.array([1])), axis=0)


def table(half: bool = False) -> Any:
    values = np.random.default_rng(4).standard_normal((VOCAB, HIDDEN))
    return values.astype(np.float16 if half else np.float32)


def export(
    folder: Path, frames: int = 1, placeholders: int = 1, keep: int | None = None, policy: Any = "keep", axes: int = 1,
    stay: int | None = None, half: bool = False, guided: bool = False, sized: bool = False,
) -> GraphSet:  # fmt: skip
    """All graphs. `stay`: visual tokens that reach the second layer."""
    total = frames * PATCHES
    keep = keep or total
    pruned = (keep, stay) if stay else None
    vision(folder / "vision.onnx", half)
    reduce(folder / "reduce.onnx", frames, keep, half, guided, sized)
    decoder(folder / "decode.onnx", pruned=pruned, axes=axes, half=half, sized=sized)
    if pruned:
        decoder(folder / "prefill.onnx", past=False, pruned=pruned, axes=axes, half=half)
    np.save(folder / "embedding.npy", table(half))
    each = total // placeholders
    ids = [[i] for i in range(each)] if axes == 1 else [[0, i // 2, i % 2] for i in range(each)]
    files = {"vision": "vision.onnx", "reduce": "reduce.onnx", "decode": "decode.onnx"}
    graphs = GraphSet(
        family="tiny",
        compute="fp16" if half else "fp32",
        weights="none",
        files=files | {"prefill": "prefill.onnx" if pruned else "decode.onnx"},
        reductions=[],
        image=ImageSpec(SIDE, SIDE, "exact", SIDE, SIDE, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        visual=VisualLayout(
            frames=frames, placeholders=placeholders, total=total, kept=keep, grid=(2, 2), ids=ids,
            span=each if axes == 1 else 2, policy=policy,
        ),
        text=TextSpec(
            hidden=HIDDEN, layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, vocab=VOCAB, position_axes=axes,
            groups=[0, 1 if stay else 0], kept=[keep, stay] if stay else [keep], image_token=IMAGE, eos=[EOS],
        ),
        signals={"hidden": [frames, PATCHES, HIDDEN], "score": [frames, PATCHES]},
        side={"text": ["text", HIDDEN], "text_mask": ["text"]} if guided else {}, sized=sized,
    )  # fmt: skip
    graphs.save(folder)
    return graphs
