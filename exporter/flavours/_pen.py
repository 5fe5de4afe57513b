"""Draws nodes into a graph that exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

CONTRIB = "com.microsoft"


class Pen:
    """`pen("Add", [a, b])` appends a node and returns its first output; `done` puts all in order and drops what is dead."""

    def __init__(self, model: ir.Model, scope: str) -> None:
        self._model, self._graph, self._scope, self._count = model, model.graph, scope, 0

    def __call__(
        self, kind: str, inputs: Sequence[ir.Value | None], outputs: Sequence[ir.Value] | None = None, contrib: bool = False,
        **attributes: Any,
    ) -> ir.Value:  # fmt: skip
        return self.node(kind, inputs, outputs, contrib, **attributes).outputs[0]

    def node(
        self, kind: str, inputs: Sequence[ir.Value | None], outputs: Sequence[ir.Value] | None = None, contrib: bool = False,
        **attributes: Any,
    ) -> ir.Node:  # fmt: skip
        """outputs: values to be made; default: one new."""
        self._count += 1
        name = f"{self._scope}/{kind}_{self._count}"
        made = list(outputs) if outputs is not None else [ir.Value(name=name)]
        given = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        node = ir.Node(CONTRIB if contrib else "", kind, inputs, given, outputs=made, name=name)
        self._graph.append(node)
        if contrib:
            self._graph.opset_imports[CONTRIB] = 1
        return node

    def ints(self, *numbers: int) -> ir.Value:
        """A constant int64 [n]."""
        return self._constant(np.array(numbers, np.int64))

    def integer(self, number: int) -> ir.Value:
        """A constant int64 []."""
        return self._constant(np.array(number, np.int64))

    def constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        """A constant of any shape and type."""
        self._count += 1
        name = f"{self._scope}/constant_{self._count}"
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.initializers[name] = value
        return value

    def done(self) -> None:
        common.RemoveUnusedNodesPass()(self._model)
        self._graph.sort()

    def _constant(self, array: np.ndarray[Any, np.dtype[np.int64]]) -> ir.Value:
        name = f"{self._scope}/{'x'.join(map(str, array.shape)) or 'scalar'}_{'_'.join(map(str, array.reshape(-1)))}"
        if name not in self._graph.initializers:
            tensor = ir.tensor(array, name=name)
            kind = ir.TensorType(ir.DataType.INT64)
            self._graph.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor
            )
        return self._graph.initializers[name]
