"""One small graph per entry of a table, and its neighbours that are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F16, F32, BF16 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16
I64, I32, I8, U8, BOOL = TensorProto.INT64, TensorProto.INT32, TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL
INT4, UINT4 = TensorProto.INT4, TensorProto.UINT4

IR_VERSION = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13, 26: 13}


class Graph:
    """`x = g.input("x", [2, 8])`, `y = g.op("Relu", x)`, `g.model(y)`. Floats are float16 unless said."""

    def __init__(self, opset: int = 21) -> None:
        self.opset, self.domains = opset, {"": opset}
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.weights: list[Any] = []
        self.functions: list[Any] = []
        self._random = np.random.default_rng(0)

    def input(self, name: str, shape: Sequence[int | str], dtype: int = F16) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def constant(self, values: Any, dtype: int | None = None) -> str:
        name, array = f"c{len(self.weights)}", np.asarray(values)
        if dtype is not None:
            tensor = helper.make_tensor(name, dtype, array.shape, array.ravel().tolist())
        else:
            tensor = numpy_helper.from_array(array, name)
        self.weights.append(tensor)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def weight(self, *shape: int) -> str:
        return self.constant((self._random.normal(size=shape) / 8).astype(np.float16))

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        number = len(self.nodes)
        made = [f"{kind}{number}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), made, f"n{number}", domain=domain, **attributes))
        if domain:
            self.domains[domain] = 1
        return made[0] if outputs == 1 else made

    def function(self, domain: str, name: str, nodes: Sequence[Any], attributes: Sequence[str] = ()) -> None:
        """A local function of x that returns y."""
        imports = [
            helper.make_opsetid(d, v) for d, v in ({"": self.opset} | dict.fromkeys((domain, "d", "e"), 1)).items()
        ]
        made = helper.make_function(domain, name, ["x"], ["y"], list(nodes), imports, list(attributes))
        self.functions.append(made)

    def model(self, *outputs: str, shape: Sequence[int] | None = None) -> onnx.ModelProto:
        """shape: of the float16 output of an operator that onnx cannot infer."""
        infos = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, infos, self.weights)
        imports = [helper.make_opsetid(domain, version) for domain, version in self.domains.items()]
        ir = IR_VERSION.get(self.opset, 10)
        model = helper.make_model(graph, opset_imports=imports, ir_version=ir, functions=self.functions)
        if shape is not None:
            model.graph.output[0].CopyFrom(helper.make_tensor_value_info(outputs[0], F16, shape))
        else:
            inferred = onnx.shape_inference.infer_shapes(model)
            for info, found in zip(model.graph.output, inferred.graph.output, strict=True):
                info.CopyFrom(found)
        return model


CASES: dict[str, Callable[[], onnx.ModelProto]] = {}


def case(function: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
    CASES[function.__name__] = function
    return function


# --- attention --------------------------------------------------------------------------------------------------------


def attend(
    opset: int = 23, seq: int | str = 8, total: int | str = 8, dim: int = 32, value_dim: int | None = None, dtype: int = F16,
    mask: bool = False, nonpad: bool = False, past: bool = False, outputs: int = 1, **attributes: Any,
) -> onnx.ModelProto:  # fmt: skip
    g = Graph(opset)
    q, k = g.input("q", [1, 4, seq, dim], dtype), g.input("k", [1, 2, total, dim], dtype)
    inputs = [q, k, g.input("v", [1, 2, total, value_dim or dim], dtype)]
    if mask or nonpad or past:
        inputs.append(g.input("mask", [1, 1, seq, total], BOOL) if mask else "")
    if past:
        inputs += [g.input(f"past_{n}", [1, 2, 4, dim], dtype) for n in "kv"]
    if nonpad:
        inputs += ["", "", g.input("nonpad", [1], I64)]
    made = g.op("Attention", *inputs, outputs=outputs, **attributes)
    return g.model(*([made] if outputs == 1 else made))


def attention_cases() -> None:
    def add(name: str, **settings: Any) -> None:
        CASES[f"attention_{name}"] = lambda: attend(**settings)

    add("plain")
    add("mask", mask=True)
    add("mask_dynamic", mask=True, seq="seq", total="total")
    add("causal_square", is_causal=1)
    add("causal_decode", is_causal=1, seq=1)
    add("causal_decode_24", opset=24, is_causal=1, seq=1)
    add("causal_dynamic", is_causal=1, seq="seq", total="total")
    add("mask_and_causal", mask=True, is_causal=1)
    add("past", past=True, outputs=3)
    add("present", outputs=3)
    add("softcap", softcap=30.0)
    add("softcap_zero", softcap=0.0)
    add("softmax_precision", softmax_precision=F32)
    add("value_dim", value_dim=16)
    add("float32", dtype=F32)
    add("bfloat16", dtype=BF16)
    add("head_256", dim=256)
    add("head_512", dim=512)
    add("nonpad", opset=24, nonpad=True)
    add("window", opset=25, left_window_size=2)
    add("qk_output_mode", qk_matmul_output_mode=1)


attention_cases()


@case
def attention_3d() -> onnx.ModelProto:
    g = Graph(23)
    q, k, v = (g.input(n, [1, 8, w]) for n, w in zip("qkv", (128, 64, 64), strict=True))
    return g.model(g.op("Attention", q, k, v, q_num_heads=4, kv_num_heads=2))


def scatter_cache(shape: Sequence[int], update: Sequence[int], **attributes: Any) -> onnx.ModelProto:
    g = Graph(24)
    made = g.op(
        "TensorScatter", g.input("past", shape), g.input("x", update), g.input("at", [shape[0]], I64), **attributes
    )
    return g.model(g.op("Relu", made), made)


@case
def tensor_scatter() -> onnx.ModelProto:
    return scatter_cache([1, 2, 16, 8], [1, 2, 4, 8], axis=2)


@case
def tensor_scatter_default_axis() -> onnx.ModelProto:
    return scatter_cache([1, 2, 16, 8], [1, 2, 4, 8])


@case
def tensor_scatter_circular() -> onnx.ModelProto:
    return scatter_cache([1, 2, 16, 8], [1, 2, 4, 8], axis=-2, mode="circular")


@case
def tensor_scatter_axis_1() -> onnx.ModelProto:
    return scatter_cache([1, 16, 2, 8], [1, 4, 2, 8], axis=1)


@case
def tensor_scatter_3d() -> onnx.ModelProto:
    return scatter_cache([1, 16, 8], [1, 4, 8], axis=-2)


@case
def rotary_embedding() -> onnx.ModelProto:
    g = Graph(23)
    return g.model(g.op("RotaryEmbedding", g.input("x", [1, 4, 8, 32]), g.weight(1, 8, 16), g.weight(1, 8, 16)))


@case
def rms_normalization() -> onnx.ModelProto:
    g = Graph(23)
    return g.model(g.op("RMSNormalization", g.input("x", [1, 8, 32]), g.weight(32)))


@case
def swish() -> onnx.ModelProto:
    g = Graph(24)
    return g.model(g.op("Swish", g.input("x", [1, 8, 32])))


# --- choosing and moving tokens ---------------------------------------------------------------------------------------


def top_k(k: int, shape: Sequence[int], **attributes: Any) -> onnx.ModelProto:
    g = Graph()
    return g.model(*g.op("TopK", g.input("x", shape), g.ints(k), outputs=2, **attributes))


@case
def topk_3840() -> onnx.ModelProto:
    return top_k(3840, [1, 5000])


@case
def topk_3841() -> onnx.ModelProto:
    return top_k(3841, [1, 5000])


@case
def topk_unsorted() -> onnx.ModelProto:
    return top_k(4, [2, 16], sorted=0)


@case
def topk_1d() -> onnx.ModelProto:
    return top_k(4, [16])


@case
def topk_integers() -> onnx.ModelProto:
    g = Graph()
    return g.model(*g.op("TopK", g.input("x", [2, 16], I64), g.ints(4), outputs=2, largest=0))


@case
def argmax_2d() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("ArgMax", g.input("x", [2, 16]), axis=1))


@case
def argmax_1d() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("ArgMax", g.input("x", [16]), axis=0))


@case
def argmin_1d() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("ArgMin", g.input("x", [16]), axis=0))


def scatter_nd(**attributes: Any) -> onnx.ModelProto:
    g = Graph()
    index = g.constant(np.array([[0], [1]], np.int64))
    return g.model(g.op("ScatterND", g.input("x", [4, 8]), index, g.input("u", [2, 8]), **attributes))


@case
def scatter_nd_plain() -> onnx.ModelProto:
    return scatter_nd()


@case
def scatter_nd_none() -> onnx.ModelProto:
    return scatter_nd(reduction="none")


@case
def scatter_nd_add() -> onnx.ModelProto:
    return scatter_nd(reduction="add")


def scatter_elements(updates: int = 2, **attributes: Any) -> onnx.ModelProto:
    g = Graph()
    index = g.input("index", [updates, 8], I64)
    return g.model(
        g.op("ScatterElements", g.input("x", [4, 8]), index, g.input("u", [updates, 8]), axis=0, **attributes)
    )


@case
def scatter_elements_plain() -> onnx.ModelProto:
    return scatter_elements()


@case
def scatter_elements_add() -> onnx.ModelProto:
    return scatter_elements(reduction="add")


@case
def scatter_elements_larger() -> onnx.ModelProto:
    return scatter_elements(updates=6)


@case
def gather_nd() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("GatherND", g.input("x", [2, 8, 4]), g.input("i", [2, 3, 1], I64), batch_dims=1))


@case
def gather_elements() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("GatherElements", g.input("x", [2, 8]), g.input("i", [2, 3], I64), axis=1))


@case
def non_zero() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("NonZero", g.input("x", [2, 8])))


@case
def non_max_suppression() -> onnx.ModelProto:
    g = Graph()
    most = g.ints(3)
    boxes, scores = g.input("b", [1, 8, 4], F32), g.input("s", [1, 1, 8], F32)
    return g.model(g.op("NonMaxSuppression", boxes, scores, most))


@case
def compress() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("Compress", g.input("x", [8, 4]), g.input("keep", [8], BOOL), axis=0))


@case
def unique() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("Unique", g.input("x", [8])))


def one_hot(computed: bool) -> onnx.ModelProto:
    g = Graph()
    depth = g.input("depth", [1], I64) if computed else g.ints(5)
    return g.model(g.op("OneHot", g.input("i", [2, 3], I64), depth, g.constant(np.array([0, 1], np.float16))))


@case
def one_hot_fixed() -> onnx.ModelProto:
    return one_hot(False)


@case
def one_hot_computed() -> onnx.ModelProto:
    return one_hot(True)


def cumsum(axis: str, dtype: int = F16) -> onnx.ModelProto:
    g = Graph()
    return g.model(
        g.op("CumSum", g.input("x", [2, 8], dtype), g.ints(1) if axis == "fixed" else g.input("a", [1], I64))
    )


@case
def cumsum_fixed() -> onnx.ModelProto:
    return cumsum("fixed")


@case
def cumsum_integers() -> onnx.ModelProto:
    return cumsum("fixed", I64)


@case
def cumsum_computed_axis() -> onnx.ModelProto:
    return cumsum("computed")


def reduce_max(computed: bool) -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("ReduceMax", g.input("x", [2, 8]), g.input("a", [1], I64) if computed else g.ints(1)))


@case
def reduce_fixed_axes() -> onnx.ModelProto:
    return reduce_max(False)


@case
def reduce_computed_axes() -> onnx.ModelProto:
    return reduce_max(True)


def squeeze(*axes: int) -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("Squeeze", g.input("x", [1, 8, 1]), *([g.ints(*axes)] if axes else [])))


@case
def squeeze_axes() -> onnx.ModelProto:
    return squeeze(0)


@case
def squeeze_all() -> onnx.ModelProto:
    return squeeze()


# --- quantised --------------------------------------------------------------------------------------------------------


def dequantized(
    dtype: int = INT4, zero: int | None = None, columns: int = 64, axis: int = 0, scale: int = F16
) -> onnx.ModelProto:
    g = Graph()
    low = 0 if dtype in (UINT4, U8) else -7
    values = np.random.default_rng(0).integers(low, 8, (64, columns))
    shape = (2, columns) if axis == 0 else (64, columns // 32)
    inputs = [g.constant(values, dtype), g.constant(np.full(shape, 0.01), scale)]
    if zero is not None:
        inputs.append(g.constant(np.full(shape, zero), dtype))
    weight = g.op("DequantizeLinear", *inputs, axis=axis, block_size=32)
    return g.model(g.op("MatMul", g.input("x", [4, 64], scale), weight))


def quantized_cases() -> None:
    def add(name: str, **settings: Any) -> None:
        CASES[f"dequantize_{name}"] = lambda: dequantized(**settings)

    add("int4")
    add("int4_axis_1", axis=1)
    add("int4_zero_point_0", zero=0)
    add("int4_zero_point", zero=3)
    add("int4_odd", columns=65)
    add("uint4", dtype=UINT4)
    add("uint4_zero_point", dtype=UINT4, zero=8)
    add("int8", dtype=I8)
    add("uint8", dtype=U8)
    add("int8_zero_point", dtype=I8, zero=3)


quantized_cases()


def activations(zero_type: int, zero: int) -> onnx.ModelProto:
    g = Graph()
    scale, point = g.constant(np.float16(0.1)), g.constant(zero, zero_type)
    quantized = g.op("QuantizeLinear", g.input("x", [4, 64]), scale, point)
    return g.model(g.op("MatMul", g.op("DequantizeLinear", quantized, scale, point), g.weight(64, 8)))


@case
def quantize_int8() -> onnx.ModelProto:
    return activations(I8, 0)


@case
def quantize_int8_zero_point() -> onnx.ModelProto:
    return activations(I8, 3)


@case
def quantize_uint8() -> onnx.ModelProto:
    return activations(U8, 128)


@case
def dynamic_quantize() -> onnx.ModelProto:
    g = Graph()
    return g.model(*g.op("DynamicQuantizeLinear", g.input("x", [4, 8], F32), outputs=3))


def cached(dtype: int) -> onnx.ModelProto:
    """Keys of a cache: the past and what is new, gathered by token, as floats."""
    g = Graph()
    past = g.input("past", [1, 2, 4, 16], dtype)
    scaled = g.op(
        "Clip", g.op("Round", g.input("new", [1, 2, 4, 16])), g.constant(np.float16(0)), g.constant(np.float16(99))
    )
    present = g.op("Concat", past, g.op("Cast", scaled, to=dtype), axis=2)
    first = g.op("Slice", present, g.ints(0), g.ints(6), g.ints(2))
    flat = g.op("Reshape", first, g.ints(2, 6, 16))
    taken = g.op("GatherND", flat, g.input("index", [2, 3, 1], I64), batch_dims=1)
    keys = g.op("Mul", g.op("Cast", taken, to=F16), g.input("scale", [2, 3, 1]))
    return g.model(present, keys)


@case
def int8_cache() -> onnx.ModelProto:
    return cached(I8)


@case
def uint8_cache() -> onnx.ModelProto:
    return cached(U8)


def embedding(dequantize_first: bool) -> onnx.ModelProto:
    g = Graph()
    table = g.constant(np.random.default_rng(0).integers(-7, 8, (16, 8)), I8)
    scale, ids = g.constant(np.float16(0.1)), g.input("ids", [1, 4], I64)
    if dequantize_first:
        return g.model(g.op("Gather", g.op("DequantizeLinear", table, scale), ids))
    return g.model(g.op("DequantizeLinear", g.op("Gather", table, ids), scale))


@case
def gather_of_dequantized() -> onnx.ModelProto:
    return embedding(True)


@case
def gather_of_integers() -> onnx.ModelProto:
    return embedding(False)


# --- images -----------------------------------------------------------------------------------------------------------


def resize(sizes: Sequence[int] = (1, 3, 16, 16), **attributes: Any) -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("Resize", g.input("x", [1, 3, 8, 8]), "", "", g.ints(*sizes), **attributes))


def resize_cases() -> None:
    def add(name: str, **settings: Any) -> None:
        CASES[f"resize_{name}"] = lambda: resize(**settings)

    add("linear", mode="linear")
    add("cubic", mode="cubic")
    add("antialias", mode="linear", antialias=1)
    add("crop", mode="linear", coordinate_transformation_mode="half_pixel_symmetric")
    add("keep_aspect", mode="linear", keep_aspect_ratio_policy="not_larger")
    add("exclude_outside", mode="cubic", exclude_outside=1)


resize_cases()


@case
def max_pool() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("MaxPool", g.input("x", [1, 3, 8, 8]), kernel_shape=[2, 2]))


@case
def max_pool_indices() -> onnx.ModelProto:
    g = Graph()
    return g.model(*g.op("MaxPool", g.input("x", [1, 3, 8, 8]), outputs=2, kernel_shape=[2, 2]))


@case
def max_pool_dilated() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("MaxPool", g.input("x", [1, 3, 8, 8]), kernel_shape=[2, 2], dilations=[2, 2]))


@case
def grid_sample() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("GridSample", g.input("x", [1, 3, 8, 8], F32), g.input("grid", [1, 4, 4, 2], F32)))


@case
def grid_sample_3d() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("GridSample", g.input("x", [1, 3, 4, 8, 8], F32), g.input("grid", [1, 2, 4, 4, 3], F32)))


@case
def uint8_image() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("Cast", g.input("x", [1, 3, 8, 8], U8), to=F16))


@case
def uint8_transposed() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("Cast", g.op("Transpose", g.input("x", [1, 8, 8, 3], U8), perm=[0, 3, 1, 2]), to=F16))


@case
def bitwise_and() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("BitwiseAnd", g.input("x", [8], I32), g.input("y", [8], I32)))


@case
def dft() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("DFT", g.input("x", [1, 8, 1], F32)))


def einsum(equation: str, *shapes: Sequence[int]) -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("Einsum", *(g.input(f"x{i}", s) for i, s in enumerate(shapes)), equation=equation))


@case
def einsum_plain() -> onnx.ModelProto:
    return einsum("bij,bjk->bik", [2, 3, 4], [2, 4, 5])


@case
def einsum_ellipsis() -> onnx.ModelProto:
    return einsum("...ij,...jk->...ik", [2, 3, 4], [2, 4, 5])


@case
def group_normalization() -> onnx.ModelProto:
    g = Graph()
    made = g.op("GroupNormalization", g.input("x", [1, 8, 4, 4]), g.weight(8), g.weight(8), num_groups=2)
    return g.model(made, shape=[1, 8, 4, 4])


@case
def layer_normalization() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("LayerNormalization", g.input("x", [1, 8]), g.weight(8), g.weight(8)))


@case
def layer_normalization_mean() -> onnx.ModelProto:
    g = Graph()
    made = g.op("LayerNormalization", g.input("x", [1, 8]), g.weight(8), g.weight(8), outputs=2)
    return g.model(*made)


@case
def matmul_integers() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("MatMul", g.input("x", [2, 8], I64), g.input("y", [8, 2], I64)))


@case
def boolean_equal() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("Equal", g.input("x", [2, 8], BOOL), g.input("y", [2, 8], BOOL)))


# --- control flow -----------------------------------------------------------------------------------------------------


def branch(name: str, rows: int) -> onnx.GraphProto:
    out = helper.make_tensor_value_info(f"{name}_y", F16, [rows, 8])
    ends = numpy_helper.from_array(np.array([rows], np.int64), f"{name}_end")
    zero = numpy_helper.from_array(np.array([0], np.int64), f"{name}_0")
    node = helper.make_node("Slice", ["x", f"{name}_0", f"{name}_end", f"{name}_0"], [f"{name}_y"], f"{name}_slice")
    return helper.make_graph([node], name, [], [out], [zero, ends])


def choose(first: int, second: int) -> onnx.ModelProto:
    g = Graph()
    g.input("x", [8, 8])
    condition = g.input("c", [], BOOL)
    return g.model(g.op("If", condition, then_branch=branch("a", first), else_branch=branch("b", second)))


@case
def if_same() -> onnx.ModelProto:
    return choose(4, 4)


@case
def topk_k_from_shape() -> onnx.ModelProto:
    """As many as another input has rows."""
    g = Graph()
    k = g.op("Shape", g.input("y", ["rows", 4]), start=0, end=1)
    return g.model(*g.op("TopK", g.input("x", [2, 16]), k, outputs=2))


@case
def mask_from_positions() -> onnx.ModelProto:
    """Plain attention with a mask made in the graph."""
    g = Graph()
    q, k, v = (g.input(n, [1, 2, "seq", 8]) for n in "qkv")
    order = g.input("order", [1, "seq"], I64)
    seen = g.op("LessOrEqual", g.op("Unsqueeze", order, g.ints(1)), g.op("Unsqueeze", order, g.ints(2)))
    zero, far = g.constant(np.float16(0)), g.constant(np.float16(-30000))
    bias = g.op("Unsqueeze", g.op("Where", seen, zero, far), g.ints(1))
    scores = g.op("Add", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), bias)
    return g.model(g.op("MatMul", g.op("Softmax", scores), v))


@case
def merge_by_one_hot() -> onnx.ModelProto:
    g = Graph()
    hot = g.op(
        "Equal", g.op("Unsqueeze", g.input("to", [1, 8], I64), g.ints(1)), g.constant(np.arange(4).reshape(1, 4, 1))
    )
    return g.model(g.op("MatMul", g.op("Cast", hot, to=F16), g.input("x", [1, 8, 16])))


@case
def if_different() -> onnx.ModelProto:
    return choose(4, 2)


# --- functions and other domains --------------------------------------------------------------------------------------


def unary(kind: str) -> list[Any]:
    return [helper.make_node(kind, ["x"], ["y"], kind)]


def call_functions(second: str) -> onnx.ModelProto:
    """d.F is Neg; e.F what is given."""
    g = Graph()
    g.function("d", "F", unary("Neg"))
    g.function("e", "F", unary(second))
    return g.model(g.op("F", g.op("F", g.input("a", [4, 8]), domain="d"), domain="e"))


@case
def function() -> onnx.ModelProto:
    g = Graph()
    g.function("d", "F", unary("Neg"))
    return g.model(g.op("F", g.input("a", [4, 8]), domain="d"))


@case
def function_same_name() -> onnx.ModelProto:
    return call_functions("Exp")


def referring(kind: str, inputs: Sequence[str], output: str, name: str, attribute: str, number: int) -> Any:
    """A node that takes an attribute from its function's attribute k."""
    node = helper.make_node(kind, list(inputs), [output], kind, domain="d" if kind == "Inner" else "")
    node.attribute.append(onnx.AttributeProto(name=attribute, ref_attr_name="k", type=number))
    return node


def nested(kind: str, attribute: str, forwarded: bool, value: Any) -> onnx.ModelProto:
    """d.Outer(k = value) calls d.Inner(k), in which k is the attribute of a node; or d.Outer is what d.Inner would be."""
    g = Graph()
    floats = onnx.AttributeProto.FLOAT if kind == "LeakyRelu" else onnx.AttributeProto.INTS
    if kind == "LeakyRelu":
        body = [referring(kind, ["x"], "y", "inner", attribute, floats)]
    else:
        body = [
            referring("Constant", [], "k_", "k", attribute, floats),
            helper.make_node("Expand", ["x", "k_"], ["y"], "expand"),
        ]
    if forwarded:
        g.function("d", "Inner", body, ["k"])
        body = [referring("Inner", ["x"], "y", "outer", "k", floats)]
    g.function("d", "Outer", body, ["k"])
    return g.model(g.op("Outer", g.input("a", [4, 8]), domain="d", k=value))


@case
def function_crashes() -> onnx.ModelProto:
    """As function_forwards_attribute_ints, but the parser has to know the value."""
    g = Graph()
    ints = onnx.AttributeProto.INTS
    body = [
        referring("Constant", [], "k_", "k", "value_ints", ints),
        helper.make_node("TopK", ["x", "k_"], ["v", "y"], "topk", axis=-1),
    ]
    g.function("d", "Inner", body, ["k"])
    g.function("d", "Outer", [referring("Inner", ["x"], "y", "outer", "k", ints)], ["k"])
    return g.model(g.op("Cast", g.op("Outer", g.input("a", [4, 8]), domain="d", k=[3]), to=F16), shape=[4, 3])


def nested_cases() -> None:
    def add(name: str, *settings: Any) -> None:
        CASES[f"function_{name}"] = lambda: nested(*settings)

    add("attribute", "LeakyRelu", "alpha", False, 0.3)
    add("attribute_ints", "Constant", "value_ints", False, [2, 4, 8])
    add("forwards_attribute", "LeakyRelu", "alpha", True, 0.3)
    add("forwards_attribute_ints", "Constant", "value_ints", True, [2, 4, 8])


nested_cases()


@case
def custom_operator() -> onnx.ModelProto:
    g = Graph()
    made = g.op("MergeTokens", g.input("x", [4, 8]), domain="my.domain")
    return g.model(made, shape=[4, 8])


@case
def contrib_rotary() -> onnx.ModelProto:
    g = Graph()
    ids = g.input("ids", [1, 8], I64)
    made = g.op(
        "RotaryEmbedding", g.input("x", [1, 4, 8, 32]), ids, g.weight(16, 16), g.weight(16, 16), domain="com.microsoft"
    )
    return g.model(made, shape=[1, 4, 8, 32])


@case
def contrib_grouped_query_attention() -> onnx.ModelProto:
    g = Graph()
    q, k, v = (g.input(n, [1, 8, w]) for n, w in zip("qkv", (128, 64, 64), strict=True))
    past = [g.input(f"past_{n}", [1, 2, 4, 32]) for n in "kv"]
    lengths, total = g.input("lengths", [1], I32), g.constant(np.array([12], np.int32))
    made = g.op(
        "GroupQueryAttention",
        q,
        k,
        v,
        *past,
        lengths,
        total,
        outputs=3,
        domain="com.microsoft",
        num_heads=4,
        kv_num_heads=2,
    )
    return g.model(made[0], shape=[1, 8, 128])


@case
def contrib_matmul_bits() -> onnx.ModelProto:
    g = Graph()
    packed = g.constant(np.zeros((8, 2, 16), np.uint8))
    scales = g.constant(np.full((16,), 0.1, np.float16))
    made = g.op(
        "MatMulNBits", g.input("x", [4, 64]), packed, scales, domain="com.microsoft", K=64, N=8, bits=4, block_size=32
    )
    return g.model(made, shape=[4, 8])


# --- what the parsers of full TensorRT document, besides ---------------------------------------------------------------


@case
def lp_normalization_3() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("LpNormalization", g.input("x", [4, 8]), axis=-1, p=3), shape=[4, 8])


@case
def lp_pool_3() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("LpPool", g.input("x", [1, 4, 8, 8]), kernel_shape=[2, 2], p=3))


@case
def pow_whole_exponent() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("Pow", g.input("x", [4, 8]), g.ints(2)))


@case
def pad_computed_axes() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("Pad", g.input("x", [4, 8]), g.ints(1, 1), "", g.input("axes", [1], I64)), shape=[4, 10])


@case
def squeeze_computed_axes() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("Squeeze", g.input("x", [1, 4, 8]), g.input("axes", [1], I64)), shape=[4, 8])


@case
def dropout_computed_mode() -> onnx.ModelProto:
    g = Graph()
    ratio = g.constant(np.array(0.5, np.float16))
    return g.model(g.op("Dropout", g.input("x", [4, 8]), ratio, g.input("training", [], BOOL)))


@case
def unsqueeze_computed_axes() -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("Unsqueeze", g.input("x", [4, 8]), g.input("axes", [1], I64)), shape=[1, 4, 8])


def recurrent(kind: str, gates: int, **attributes: int) -> onnx.ModelProto:
    """x [3, 2, 8]: three steps of two samples, or with layout 1 two steps of three."""
    g = Graph()
    weights = g.weight(1, 4 * gates, 8), g.weight(1, 4 * gates, 4)
    return g.model(g.op(kind, g.input("x", [3, 2, 8]), *weights, hidden_size=4, **attributes))


RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""Operator → gates."""


def recurrent_cases() -> None:
    def add(name: str, *settings: Any, **attributes: int) -> None:
        CASES[name] = lambda: recurrent(*settings, **attributes)

    for kind, gates in RECURRENT.items():
        add(kind.lower(), kind, gates)
        add(f"{kind.lower()}_layout", kind, gates, layout=1)
    add("lstm_coupled", "LSTM", 4, input_forget=1)


recurrent_cases()


def cast_and_back(to: int) -> onnx.ModelProto:
    g = Graph(23)
    return g.model(g.op("Cast", g.op("Cast", g.input("x", [4, 8]), to=to), to=F16), shape=[4, 8])


def cast_cases() -> None:
    for name, to in {
        "float8": TensorProto.FLOAT8E4M3FN,
        "float4": TensorProto.FLOAT4E2M1,
        "int4": INT4,
        "int8": I8,
        "bfloat16": BF16,
    }.items():
        CASES[f"cast_{name}"] = partial(cast_and_back, to)


cast_cases()


def mean_variance(dtype: int) -> onnx.ModelProto:
    g = Graph()
    return g.model(g.op("MeanVarianceNormalization", g.input("x", [1, 4, 8, 8], dtype)))


CASES["mean_variance_float16"], CASES["mean_variance_float32"] = (
    partial(mean_variance, F16),
    partial(mean_variance, F32),
)


def sequence_lengths(dtype: int) -> onnx.ModelProto:
    g = Graph()
    weights = [g.constant(np.zeros(shape), dtype) for shape in ((1, 16, 8), (1, 16, 4))]
    lengths = g.constant(np.array([3, 1], np.int32))
    return g.model(g.op("LSTM", g.input("x", [3, 2, 8], dtype), *weights, "", lengths, hidden_size=4))


CASES["lstm_lengths_float16"], CASES["lstm_lengths_float32"] = (
    partial(sequence_lengths, F16),
    partial(sequence_lengths, F32),
)


@case
def rotary_int32_ids() -> onnx.ModelProto:
    g = Graph(23)
    ids = g.input("ids", [1, 8], I32)
    made = g.op("RotaryEmbedding", g.input("x", [1, 4, 8, 32]), g.weight(16, 16), g.weight(16, 16), ids)
    return g.model(made, shape=[1, 4, 8, 32])


@case
def function_input_shadows() -> onnx.ModelProto:
    """The function's input is called x, as is the graph's other one."""
    g = Graph()
    x = g.input("x", [4, 8])
    g.function("d", "F", unary("Neg"))
    return g.model(g.op("Add", x, g.op("F", g.input("a", [4, 8]), domain="d")))


TWINS: dict[str, Callable[[], onnx.ModelProto]] = {
    "attention_nonpad": lambda: attend(24),
    "attention_window": lambda: attend(25),
    **{f"{kind.lower()}_layout": partial(recurrent, kind, gates) for kind, gates in RECURRENT.items()},
    "function_same_name": lambda: call_functions("Neg"),
    "function_attribute": lambda: nested("LeakyRelu", "alpha", False, 0.5),
    "function_attribute_ints": lambda: nested("Constant", "value_ints", False, [3, 4, 8]),
    "function_forwards_attribute": lambda: nested("LeakyRelu", "alpha", True, 0.5),
    "function_forwards_attribute_ints": lambda: nested("Constant", "value_ints", True, [3, 4, 8]),
}
"""Graphs that mean something else than the case of that name."""
