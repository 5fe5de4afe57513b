"""What an ONNX file says of itself, read without the `onnx` package: it is not installed where bundles are built and run."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from exporter.errors import ExportError, VerificationError


def external_files(graph: Path) -> dict[str, Path]:
    """The files with the graph's weights, by the name the graph has for them. They must lie in the graph's folder."""
    if not graph.is_file():
        raise ExportError(f"There is no graph {graph}. Run export first.")
    files = {}
    for location in sorted(set(OnnxFile(graph).locations)):
        path = graph.parent / location
        inside = path.parent.resolve().is_relative_to(graph.parent.resolve())
        if Path(location).is_absolute() or ".." in Path(location).parts or not inside:
            raise VerificationError(f"{graph} wants weights from outside its folder: {location}. Do not use this file.")
        if not path.is_file():
            raise ExportError(f"{graph} wants weights from {path}, which is not there. Run export again.")
        files[location] = path
    return files


class OnnxFile:
    """Operators and external files of an ONNX file, read from protobuf's wire format.

    The `onnx` package is not installed where bundles are built and run, and these two lists need none of it.
    """

    def __init__(self, path: Path) -> None:
        self.operators: list[str] = []
        self.locations: list[str] = []
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise ExportError(f"{path} is empty. Run export again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
                try:
                    for field, begin, end in _fields(view, 0, len(view)):
                        if field == 7:  # ModelProto.graph
                            self._graph(view, begin, end)
                except (IndexError, UnicodeDecodeError, RecursionError) as e:
                    raise ExportError(f"{path} is not an ONNX file, or is damaged. Run export again.") from e

    def _graph(self, view: memoryview, begin: int, end: int) -> None:
        for field, b, e in _fields(view, begin, end):
            if field == 1:  # GraphProto.node
                for part, nb, ne in _fields(view, b, e):
                    if part == 4:  # NodeProto.op_type
                        self.operators.append(_text(view, nb, ne))
                    elif part == 5:  # NodeProto.attribute
                        for kind, ab, ae in _fields(view, nb, ne):
                            if kind in (6, 11):  # AttributeProto.g, graphs
                                self._graph(view, ab, ae)
                            elif kind in (5, 10):  # AttributeProto.t, tensors
                                self._tensor(view, ab, ae)
            elif field == 5:  # GraphProto.initializer
                self._tensor(view, b, e)

    def _tensor(self, view: memoryview, begin: int, end: int) -> None:
        for field, b, e in _fields(view, begin, end):
            if field == 13:  # TensorProto.external_data: key 1, value 2
                entry = {part: _text(view, vb, ve) for part, vb, ve in _fields(view, b, e)}
                if entry.get(1) == "location":
                    self.locations.append(entry.get(2, ""))


def _fields(view: memoryview, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Field number and byte range of every length-delimited field; others are skipped."""
    while begin < end:
        tag, begin = _varint(view, begin)
        wire = tag & 7
        if wire == 2:
            size, begin = _varint(view, begin)
            if begin + size > end:
                raise IndexError("a field ends behind its message")
            yield tag >> 3, begin, begin + size
            begin += size
        elif wire == 0:
            _, begin = _varint(view, begin)
        elif wire in (1, 5):
            begin += 8 if wire == 1 else 4
        else:
            raise IndexError(f"wire type {wire}")


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = view[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise IndexError("a number of more than 64 bits")


def _text(view: memoryview, begin: int, end: int) -> str:
    return bytes(view[begin:end]).decode()
