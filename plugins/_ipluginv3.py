"""Every plugin of a library as an IPluginV3 in Python: what `_ipluginv3.cpp` is, for where TensorRT's headers are not.

TensorRT's wheel has no headers, its Python interface has what a plugin needs, in 10.3 and newer alike. Nothing of a tensor is
seen here: TensorRT gives addresses, sizes and the stream, and the library's kernels get them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins._contract import DOMAIN, VERSION
from plugins._library import RANK, Library, Memory

_known: list[Any] = []
"""Creators, which a registry does not keep alive."""


def register(trt: Any, library: Library) -> None:
    """Make the plugins known to this process's TensorRT, those that are not yet.

    Raises:
        RuntimeError: TensorRT does not take one.
    """
    registry = trt.get_plugin_registry()
    for name in library.names:
        if registry.get_creator(name, VERSION, DOMAIN) is None:
            made = creator(trt, library, name)
            if not registry.register_creator(made, DOMAIN):
                raise RuntimeError(f"TensorRT does not register the plugin {name}.")
            _known.append(made)


def creator(trt: Any, library: Library, name: str) -> Any:
    """TensorRT's IPluginCreatorV3One of one plugin."""
    types = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.INT64: "int64"}
    theirs = {dtype: kind for kind, dtype in types.items()}

    def memories(descriptions: Sequence[Any], addresses: Sequence[int]) -> list[Memory]:
        return [Memory(a, tuple(d.dims), types[d.type]) for d, a in zip(descriptions, addresses, strict=True)]

    class Fields:
        """Integers by name, as a PluginFieldCollection, which points to numbers and names and keeps neither."""

        def __init__(self, values: dict[str, list[int]]) -> None:
            kind = trt.PluginFieldType.INT32
            self.each = [trt.PluginField(name, np.array(value, np.int32), kind) for name, value in values.items()]
            self.all = trt.PluginFieldCollection(self.each)

    class Node(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        def __init__(self, attributes: dict[str, int]) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = name, DOMAIN, VERSION
            self.attributes, self.num_outputs = attributes, library.count(name, attributes)
            self.stored = Fields({attribute: [value] for attribute, value in attributes.items()})

        def get_capability_interface(self, type: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Node(self.attributes)

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            inputs = [Memory(0, (), types[kind]) for kind in input_types]
            return [theirs[dtype] for _, dtype in library.axes(name, inputs, self.attributes)]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            given = [Memory(0, (0,) * len(dims), "float32") for dims in inputs]
            found = []
            for axes, _ in library.axes(name, given, self.attributes):
                dims = trt.DimsExprs(len(axes))
                for i, axis in enumerate(axes):
                    dims[i] = plus = builder.constant(axis.plus)
                    if axis.input >= 0:
                        size = inputs[axis.input][axis.axis]
                        dims[i] = builder.operation(trt.DimensionOperation.SUM, size, plus) if axis.plus else size
                found.append(dims)
            return found

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None: ...

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            asked = in_out[pos].desc
            known = all(d.desc.type in types for d in in_out[: max(num_inputs, pos + 1)])
            if asked.format != trt.TensorFormat.LINEAR or not known or len(tuple(asked.dims)) > RANK:
                return False
            if pos < num_inputs:
                return library.accepts(name, pos, types[asked.type])
            inputs = [Memory(0, tuple(d.desc.dims), types[d.desc.type]) for d in in_out[:num_inputs]]
            _, dtype = library.axes(name, inputs, self.attributes)[pos - num_inputs]
            return dtype == types[asked.type]

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            largest = [Memory(0, tuple(d.max), types[d.desc.type]) for d in inputs]
            return library.workspace(name, largest, self.attributes)

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None: ...

        def set_tactic(self, tactic: int) -> None: ...

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            return self.stored.all

        def enqueue(
            self, input_desc: Sequence[Any], output_desc: Sequence[Any], inputs: Sequence[int], outputs: Sequence[int],
            workspace: int, stream: int,
        ) -> None:  # fmt: skip
            given, made = memories(input_desc, inputs), memories(output_desc, outputs)
            library.run(name, given, made, self.attributes, workspace, stream)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = name, DOMAIN, VERSION
            self.fields = Fields({attribute: [] for attribute in library.attributes(name)})
            self.field_names = self.fields.all

        def create_plugin(self, node: str, given: Sequence[Any], phase: Any) -> Any:
            values = {field.name: np.ravel(field.data) for field in given}
            for attribute in library.attributes(name):
                if attribute not in values or values[attribute].size != 1:
                    raise ValueError(f"{name}: the node {node} has no integer `{attribute}`")
            return Node({a: int(values[a][0]) for a in library.attributes(name)})

    return Creator()
