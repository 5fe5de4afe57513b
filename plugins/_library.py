"""The library that CMake makes of the kernels: where it is, and how to call it without TensorRT. Mirrors `_plugin.h`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent
VARIABLE = "EDGETRIM_PLUGINS"
FILE = "libedgetrim_plugins.so"
HOW = f"cmake -S {FOLDER} -B {FOLDER / 'build'} && cmake --build {FOLDER / 'build'}"
"""Builds it, for the GPU in this machine."""

TYPES = {"float32": 0, "float16": 1, "int64": 2}
_NAMES = {number: dtype for dtype, number in TYPES.items()}
RANK = 4


def path() -> Path | None:
    """The library: where the environment variable says, else in the build folder beside the sources. None: not built."""
    found = Path(os.environ.get(VARIABLE) or FOLDER / "build" / FILE)
    return found if found.is_file() else None


class Memory(NamedTuple):
    """A tensor, row-major and contiguous. address: on the host or the device, where the library's kernels run."""

    address: int
    shape: tuple[int, ...]
    dtype: str


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("shape", ctypes.c_int64 * RANK), ("rank", ctypes.c_int32), ("type", ctypes.c_int32),
    ]  # fmt: skip


class Axis(ctypes.Structure):
    """The size of an output's axis: that of axis `axis` of input `input`, and `plus`. input -1: `plus` alone."""

    _fields_ = [("input", ctypes.c_int32), ("axis", ctypes.c_int32), ("plus", ctypes.c_int64)]


class Library:
    """An opened library."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._c: Any = ctypes.CDLL(str(file))
        self._c.edgetrim_name.restype = self._c.edgetrim_attribute.restype = ctypes.c_char_p
        self._c.edgetrim_run.restype = ctypes.c_char_p
        self._c.edgetrim_workspace.restype = ctypes.c_int64
        self._numbers = {self._c.edgetrim_name(i).decode(): i for i in range(self._c.edgetrim_count())}

    @property
    def wrapped(self) -> bool:
        """Whether TensorRT can load it by itself: it was built with TensorRT's headers."""
        return hasattr(self._c, "getCreators")

    @property
    def names(self) -> list[str]:
        return sorted(self._numbers)

    def attributes(self, name: str) -> list[str]:
        """Names of a plugin's attributes, in order."""
        found: list[str] = []
        while (text := self._c.edgetrim_attribute(self._numbers[name], len(found))) is not None:
            found.append(text.decode())
        return found

    def outputs(
        self, name: str, inputs: Sequence[Memory], attributes: Mapping[str, int]
    ) -> list[tuple[tuple[int, ...], str]]:
        """Shape and dtype of every output."""
        number, values = self._numbers[name], self._values(name, attributes)
        found = []
        for i in range(self.count(name, attributes)):
            out = _Tensor()
            self._c.edgetrim_output(number, i, _tensors(inputs), len(inputs), values, len(values), ctypes.byref(out))
            found.append((tuple(out.shape[: out.rank]), _NAMES[out.type]))
        return found

    def count(self, name: str, attributes: Mapping[str, int]) -> int:
        """How many outputs there are."""
        values = self._values(name, attributes)
        return int(self._c.edgetrim_outputs(self._numbers[name], values, len(values)))

    def accepts(self, name: str, number: int, dtype: str) -> bool:
        """Whether input `number` may be of that type."""
        return bool(self._c.edgetrim_accepts(self._numbers[name], number, TYPES[dtype]))

    def axes(
        self, name: str, inputs: Sequence[Memory], attributes: Mapping[str, int]
    ) -> list[tuple[list[Axis], str]]:  # fmt: skip
        """Where the size of every output's axes comes from, and its dtype. Of the inputs' shapes only the lengths count."""
        number, values = self._numbers[name], self._values(name, attributes)
        found = []
        for i in range(self.count(name, attributes)):
            out, axes = _Tensor(), (Axis * RANK)()
            self._c.edgetrim_axes(
                number, i, _tensors(inputs), len(inputs), values, len(values), ctypes.byref(out), axes
            )
            found.append((list(axes)[: out.rank], _NAMES[out.type]))
        return found

    def workspace(self, name: str, inputs: Sequence[Memory], attributes: Mapping[str, int]) -> int:
        """Bytes of scratch memory."""
        values = self._values(name, attributes)
        return int(self._c.edgetrim_workspace(self._numbers[name], _tensors(inputs), len(inputs), values, len(values)))

    def run(
        self,
        name: str,
        inputs: Sequence[Memory],
        outputs: Sequence[Memory],
        attributes: Mapping[str, int],
        workspace: int = 0,
        stream: int = 0,
    ) -> None:
        """Run a plugin, on a device behind what `stream` already has to do. workspace, stream: addresses.

        Raises:
            ValueError: the shapes or attributes are not what it takes, or the launch failed.
        """
        values = self._values(name, attributes)
        wrong = self._c.edgetrim_run(
            self._numbers[name], _tensors(inputs), len(inputs), _tensors(outputs), len(outputs), values, len(values),
            ctypes.c_void_p(workspace), ctypes.c_void_p(stream),
        )  # fmt: skip
        if wrong is not None:
            raise ValueError(f"{name}: {wrong.decode()}")

    def order(self, order: int) -> None:
        """In a library that emulates the device: in which order threads run between barriers. 0 ascending, 1 descending, others
        seed a random one."""
        self._c.edgetrim_order(order)

    def _values(self, name: str, attributes: Mapping[str, int]) -> Any:
        given = [attributes[a] for a in self.attributes(name)]
        return (ctypes.c_int64 * len(given))(*given)


def _tensors(memories: Sequence[Memory]) -> Any:
    return (_Tensor * len(memories))(
        *(
            _Tensor(m.address, (ctypes.c_int64 * RANK)(*m.shape), len(m.shape), TYPES[m.dtype])
            for m in memories
        )
    )  # fmt: skip
