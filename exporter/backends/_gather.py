"""Rows of ONNX Runtime's own values: a graph of one Gather, so that a KV cache is reordered where it lies.

The `onnx` package is not installed where engines run, and a graph of one node is a few fields of protobuf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

IR_VERSION, OPSET = 10, 21
TYPES = {
    "tensor(float)": 1, "tensor(int8)": 3, "tensor(int32)": 6, "tensor(int64)": 7, "tensor(bool)": 9, "tensor(float16)": 10,
    "tensor(double)": 11,
}  # fmt: skip
"""ONNX Runtime's name of a type → TensorProto.DataType."""


def model(kind: str, rank: int) -> bytes:
    """ONNX: value [rows, …] of `rank` axes, rows int64 [n] → found [n, …]. kind: ONNX Runtime's name of the type."""
    node = _text(1, "value") + _text(1, "rows") + _text(2, "found") + _text(3, "gather") + _text(4, "Gather")
    rest = [f"axis_{i}" for i in range(1, rank)]
    value, rows = _value("value", TYPES[kind], ["of", *rest]), _value("rows", TYPES["tensor(int64)"], ["n"])
    found = _value("found", TYPES[kind], ["n", *rest])
    graph = _field(1, node) + _text(2, "gather") + _field(11, value) + _field(11, rows) + _field(12, found)
    return _number(1, IR_VERSION) + _field(7, graph) + _field(8, _text(1, "") + _number(2, OPSET))


class Gather:
    """Rows of values on one device; one session per type and rank, opened when first needed."""

    def __init__(self, provider: str, device: str, threads: int | None) -> None:
        self._provider, self._device, self._threads = provider, device, threads
        self._sessions: dict[tuple[str, int], Any] = {}

    def __call__(self, value: Any, rows: Any) -> Any:
        """value: an OrtValue. rows: int64 [n]. Returns an OrtValue on the device."""
        session = self._session(value.data_type(), len(value.shape()))
        binding = session.io_binding()
        binding.bind_ortvalue_input("value", value)
        binding.bind_cpu_input("rows", np.ascontiguousarray(rows, np.int64))
        binding.bind_output("found", self._device)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    def close(self) -> None:
        self._sessions.clear()

    def _session(self, kind: str, rank: int) -> Any:
        import onnxruntime

        if (kind, rank) not in self._sessions:
            options = onnxruntime.SessionOptions()
            if self._threads:
                options.intra_op_num_threads = self._threads
            found = onnxruntime.InferenceSession(model(kind, rank), options, providers=[self._provider])
            self._sessions[kind, rank] = found
        return self._sessions[kind, rank]


def _value(name: str, kind: int, axes: Sequence[str]) -> bytes:
    """ValueInfoProto of a tensor with named axes."""
    shape = b"".join(_field(1, _text(2, axis)) for axis in axes)
    return _text(1, name) + _field(2, _field(1, _number(1, kind) + _field(2, shape)))


def _text(field: int, text: str) -> bytes:
    return _field(field, text.encode())


def _field(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
