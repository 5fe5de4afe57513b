"""The words in which the rules of a table say when they hold. Each public function is one, its parameters are its settings.

A condition holds only where the graph is known to be so: a type, a size or a constant that nobody can tell is no finding.
Inputs are numbered as in the operator's definition; a negative axis counts from the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST_CONSTANT = 2**16
"""Elements. Larger ones are weights, which no rule asks for the values of."""


def attribute(node: ir.Node, opset: int, name: str, values: list[int | float | str]) -> bool:
    """It is given, and has one of these values."""
    return _given(node, name) in values


def attribute_other(node: ir.Node, opset: int, name: str, values: list[int | float | str]) -> bool:
    """It is given, and has none of these values."""
    found = _given(node, name)
    return found is not None and found not in values


def attribute_given(node: ir.Node, opset: int, name: str) -> bool:
    return name in node.attributes


def attribute_matches(node: ir.Node, opset: int, name: str, pattern: str) -> bool:
    """It is text in which a regular expression is found."""
    found = _given(node, name)
    return isinstance(found, str) and re.search(pattern, found) is not None


def elements_other(node: ir.Node, opset: int, name: str, value: int) -> bool:
    """It is a list with an element that is not this value."""
    attr = node.attributes.get(name)
    return attr is not None and not attr.is_ref() and any(element != value for element in attr.as_ints())


def input_given(node: ir.Node, opset: int, input: int) -> bool:
    return _input(node, input) is not None


def input_computed(node: ir.Node, opset: int, input: int) -> bool:
    """It depends on an input of the graph, in a subgraph or function also on what comes from outside."""
    value = _input(node, input)
    return value is not None and not _is_constant(value, set())


def input_constant(node: ir.Node, opset: int, input: int) -> bool:
    """It does not depend on an input of the graph."""
    value = _input(node, input)
    return value is not None and _is_constant(value, set())


def input_type(node: ir.Node, opset: int, input: int, types: list[str]) -> bool:
    """It is of one of these ONNX types."""
    value = _input(node, input)
    return value is not None and value.dtype is not None and value.dtype.name in types


def outputs_above(node: ir.Node, opset: int, count: int) -> bool:
    """An output behind that many has a name or a user."""
    return any(v.name or v.uses() for v in node.outputs[count:])


def constant_above(node: ir.Node, opset: int, input: int, limit: int) -> bool:
    """A constant has an element above the limit."""
    found = _constant(node, input)
    return found is not None and bool((found > limit).any())


def constant_not_zero(node: ir.Node, opset: int, input: int) -> bool:
    found = _constant(node, input)
    return found is not None and bool((found.astype(np.float32) != 0).any())


def rank_below(node: ir.Node, opset: int, input: int, rank: int) -> bool:
    found = _dims(node, input)
    return found is not None and len(found) < rank


def rank_above(node: ir.Node, opset: int, input: int, rank: int) -> bool:
    found = _dims(node, input)
    return found is not None and len(found) > rank


def size_above(node: ir.Node, opset: int, input: int, axis: int, limit: int, rank: int) -> bool:
    """Of an input of that rank, a fixed size is above the limit."""
    found = _dims(node, input)
    size = found[axis] if found is not None and len(found) == rank else None
    return isinstance(size, int) and size > limit


def size_odd(node: ir.Node, opset: int, input: int, axis: int) -> bool:
    found = _dims(node, input)
    size = found[axis] if found else None
    return isinstance(size, int) and size % 2 == 1


def sizes_differ(node: ir.Node, opset: int, first: int, second: int, axis: int) -> bool:
    """Of two inputs: two numbers, two names, or a number and a name."""
    a, b = _dims(node, first), _dims(node, second)
    if not a or not b or None in (a[axis], b[axis]):
        return False
    return a[axis] != b[axis]


def size_exceeds(node: ir.Node, opset: int, first: int, second: int) -> bool:
    """Some fixed size of the first input is above that of the second."""
    pairs = zip(_dims(node, first) or [], _dims(node, second) or [], strict=False)
    return any(isinstance(a, int) and isinstance(b, int) and a > b for a, b in pairs)


def opset_from(node: ir.Node, opset: int, version: int) -> bool:
    """The graph's opset is this one or newer."""
    return opset >= version


def _given(node: ir.Node, name: str) -> object:
    """An attribute's value, or None. One that a function's caller decides is not known."""
    attr = node.attributes.get(name)
    return None if attr is None or attr.is_ref() else attr.value


def _input(node: ir.Node, input: int) -> ir.Value | None:
    return node.inputs[input] if input < len(node.inputs) else None


def _dims(node: ir.Node, input: int) -> list[int | str | None] | None:
    """Sizes, names of axes, or None where neither is known."""
    value = _input(node, input)
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def _constant(node: ir.Node, input: int) -> npt.NDArray[Any] | None:
    """A small constant that is in the graph's own file."""
    import onnx_ir as ir

    value = _input(node, input)
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > LARGEST_CONSTANT or isinstance(tensor, ir.ExternalTensor):
        return None
    return tensor.numpy()


def _is_constant(value: ir.Value, seen: set[ir.Value]) -> bool:
    """Whether a parser can know it: an initializer, or computed from such and from fixed shapes only."""
    if value.const_value is not None or value in seen:
        return True
    seen.add(value)
    node = value.producer()
    if node is None:
        return False
    if node.op_type in ("Shape", "Size"):
        shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
        if shape is not None and all(isinstance(d, int) for d in shape):
            return True
    return all(_is_constant(v, seen) for v in node.inputs if v is not None)


# --- of a local function ----------------------------------------------------------------------------------------------


def name_elsewhere(function: ir.Function, model: ir.Model) -> bool:
    """Another domain has a function of this name."""
    return any(other.name == function.name and other.domain != function.domain for other in model.functions.values())


def forwards_attribute(function: ir.Function, model: ir.Model) -> bool:
    """It calls another local function and hands on an attribute of its own."""
    return any(
        node.op_identifier() in model.functions and any(attr.is_ref() for attr in node.attributes.values())
        for node in function
    )


def input_shadows(function: ir.Function, model: ir.Model) -> bool:
    """An input is called like a value of the graph."""
    names = set(_names(model.graph))
    return any(value.name in names for value in function.inputs)


def _names(graph: ir.Graph) -> Iterator[str | None]:
    yield from (value.name for value in graph.inputs)
    yield from graph.initializers
    for node in graph:
        yield from (value.name for value in node.outputs)
