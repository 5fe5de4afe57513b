"""Walks graphs backwards and forwards, to recognise what a plugin replaces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import onnx_ir as ir


class NoMatch(Exception):
    """A graph is something else here."""


class Part(NamedTuple):
    """A slice along one axis."""

    of: ir.Value
    axis: int
    start: int
    stop: int
    step: int


def made(value: ir.Value, kind: str, count: int | None = None) -> Sequence[ir.Value]:
    """Inputs of the node of that kind, and with so many of them, that made a value."""
    node = value.producer()
    if node is None or node.op_type != kind or node.domain != "":
        raise NoMatch
    found = [v for v in node.inputs if v is not None]
    if count not in (None, len(found)):
        raise NoMatch
    return found


def is_made(value: ir.Value, kind: str) -> bool:
    node = value.producer()
    return node is not None and node.op_type == kind and node.domain == ""


def part(value: ir.Value) -> Part:
    """A Slice along one axis, with constants."""
    of, starts, stops, axes, steps = made(value, "Slice", 5)
    if of.shape is None:
        raise NoMatch
    return Part(of, integer(axes) % len(of.shape), integer(starts), integer(stops), integer(steps))


def integer(value: ir.Value) -> int:
    """A constant of one element."""
    return int(number(value))


def number(value: ir.Value) -> float:
    if value.const_value is None or value.const_value.size != 1:
        raise NoMatch
    return float(value.const_value.numpy().reshape(()))


def attribute(value: ir.Value, name: str, default: int) -> int:
    """An integer attribute of the node that made a value."""
    node = value.producer()
    assert node is not None
    return node.attributes.get_int(name, default)


def users(value: ir.Value, kind: str) -> list[ir.Node]:
    return [n for n in value.consumers() if n.op_type == kind and n.domain == ""]


def only_user(value: ir.Value, kind: str) -> ir.Node:
    """The node of that kind that alone uses a value, which is no output of the graph either."""
    found = list(value.consumers())
    if len(found) != 1 or found[0].op_type != kind or value.is_graph_output():
        raise NoMatch
    return found[0]


def size(value: ir.Value, axis: int) -> int:
    """The static size of an axis."""
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        raise NoMatch
    found = value.shape[axis]
    if not isinstance(found, int):
        raise NoMatch
    return found


def rank(value: ir.Value) -> int:
    if value.shape is None:
        raise NoMatch
    return len(value.shape)


def uncast(value: ir.Value) -> ir.Value:
    """Before a cast from half precision."""
    import onnx_ir as ir

    if is_made(value, "Cast") and value.dtype == ir.DataType.FLOAT:
        (before,) = made(value, "Cast", 1)
        if before.dtype == ir.DataType.FLOAT16:
            return before
    return value


def behind(values: Iterable[ir.Value]) -> set[ir.Value]:
    """The values, and all that is computed from them."""
    found: set[ir.Value] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if value not in found:
            found.add(value)
            waiting.extend(out for node in value.consumers() for out in node.outputs)
    return found


def nodes(graph: ir.Graph, kind: str) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type == kind and node.domain == "")
