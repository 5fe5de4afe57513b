"""FP4 for runtimes that do not have the type: the same bytes of the same weight file, decoded by plain operators of opset 21.

A byte is two codes; it is looked up in a table of 256 pairs of numbers. All of it is constant, so that a runtime which folds constants
does it once, when it opens the graph, and holds the weights as floats from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporter.quantize._contract import E2M1
from exporter.stages._trace import IR_VERSION, OPSET

SUFFIX = ".lookup"
"""How the name of such a graph ends before the extension."""

FLOAT, INT32, UINT8 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.UINT8


def apply(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Graph with FP4 → the graph without it, a new file in `folder`."""
    written: dict[str, str] = {}
    for file in dict.fromkeys(files):
        model = ir.load(folder / file)
        if spell_out(model):
            written[file] = f"{Path(file).stem}{SUFFIX}.onnx"
            ir.save(model, folder / written[file])
    return written


def spell_out(model: ir.Model) -> bool:
    """Put plain operators in the place of every DequantizeLinear of FP4; whether there was one."""
    found = [n for n in model.graph if n.op_type == "DequantizeLinear" and _is_fp4(n.inputs[0])]
    for node in found:
        _replace(model.graph, node)
    if found:
        model.graph.opset_imports[""], model.ir_version = OPSET, IR_VERSION
    return bool(found)


def _is_fp4(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT4E2M1


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    """`node`: dequantises a matrix [in, out] by scales [in / block, out] that another one dequantises by a scalar."""
    numbers, scales = node.inputs
    assert numbers is not None and scales is not None and numbers.shape is not None
    nested = scales.producer()
    assert nested is not None
    narrow, whole = nested.inputs
    assert narrow is not None and whole is not None
    rows, columns = numbers.shape.numpy()
    block = node.attributes.get_int("block_size", 1)
    stem = numbers.name or ""

    def made(
        name: str, op: str, inputs: Sequence[ir.Value], kind: ir.DataType, *shape: int, **attributes: int
    ) -> ir.Value:
        given = [ir.AttrInt64(key, number) for key, number in attributes.items()]
        out = ir.Value(name=f"{stem}.{name}", shape=ir.Shape(shape), type=ir.TensorType(kind))
        graph.insert_before(node, ir.Node("", op, inputs, given, outputs=[out], name=f"{stem}/{name}"))
        return out

    def sizes(name: str, *numbers: int) -> ir.Value:
        return _constant(graph, f"{stem}.{name}", np.array(numbers, np.int64))

    blocks = rows // block, block, columns
    packed = _as_bytes(graph, numbers, rows, columns)
    codes = made("codes", "Cast", [packed], INT32, rows, columns // 2, to=INT32.value)
    table = _constant(graph, "fp4.pairs", TABLE)
    pairs = made("pairs", "Gather", [table, codes], FLOAT, rows, columns // 2, 2, axis=0)
    values = made("values", "Reshape", [pairs, sizes("blocks", *blocks)], FLOAT, *blocks)
    wide = made("scale.wide", "Cast", [narrow], FLOAT, rows // block, columns, to=FLOAT.value)
    scale = made("scale.scaled", "Mul", [wide, whole], FLOAT, rows // block, columns)
    each = made("scale.each", "Unsqueeze", [scale, sizes("axis", 1)], FLOAT, rows // block, 1, columns)
    product = made("scaled", "Mul", [values, each], FLOAT, *blocks)
    matrix = made("matrix", "Reshape", [product, sizes("shape", rows, columns)], FLOAT, rows, columns)
    node.outputs[0].replace_all_uses_with(matrix)
    graph.remove([node, nested], safe=True)
    del graph.initializers[stem]


TABLE: npt.NDArray[np.float32] = np.array([[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)], np.float32)
"""[256, 2]: ONNX has the first of two values in the low half."""


def _as_bytes(graph: ir.Graph, numbers: ir.Value, rows: int, columns: int) -> ir.Value:
    stored = numbers.const_value
    assert isinstance(stored, ir.ExternalTensor)
    name, shape = f"{numbers.name}.bytes", ir.Shape((rows, columns // 2))
    tensor = ir.ExternalTensor(
        stored.location, stored.offset, stored.length, UINT8, shape=shape, name=name, base_dir=stored.base_dir
    )
    graph.initializers[name] = ir.Value(name=name, shape=shape, type=ir.TensorType(UINT8), const_value=tensor)
    return graph.initializers[name]


def _constant(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return graph.initializers[name]
