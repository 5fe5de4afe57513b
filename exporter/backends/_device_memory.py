"""Device memory that is taken once and used again: what a value has let go is the next value's.

A decode step writes the next cache while it reads the last one; when the last one is let go, its memory is what the step
after writes to. So a cache grows between two sets of buffers, and nothing that is held ever changes.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.backends._contract import Array
from exporter.backends._cuda import OUT_OF_MEMORY, Cuda, CudaError
from exporter.errors import EnvironmentMismatch

Shape = tuple[int, ...]

STEPS = 8
"""Sizes per doubling: a buffer is at most an eighth larger than what was asked for, and serves other prompts of about that length."""
LEAST = 256
"""Bytes. An empty tensor needs memory of its own too: TensorRT wants addresses that differ."""


def size_class(size: int) -> int:
    """The bytes of a buffer for `size` bytes."""
    if size <= LEAST:
        return LEAST
    step = (1 << (size - 1).bit_length()) // (2 * STEPS)
    return -(-size // step) * step


class Buffer:
    """Device memory at `address`; goes back to its pool when nothing holds it any more."""

    __slots__ = ("_give_back", "address", "size")

    def __init__(self, address: int, size: int, give_back: Callable[[int, int], None]) -> None:
        self.address, self.size, self._give_back = address, size, give_back

    def __del__(self) -> None:
        self._give_back(self.address, self.size)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceArray:
    """A tensor on the device. It never changes, and can be read until the last runner is closed."""

    buffer: Buffer
    shape: Shape
    dtype: np.dtype[Any]

    @property
    def address(self) -> int:
        return self.buffer.address

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Pool:
    """Buffers by size, the lowest address first, so that addresses repeat where work does.

    Args:
        allocate: bytes → address; raises CudaError. free: takes the address.
        memory: bytes that are free, and in all.
    """

    def __init__(
        self, allocate: Callable[[int], int], free: Callable[[int], None], memory: Callable[[], tuple[int, int]]
    ) -> None:
        self._allocate, self._free, self._memory = allocate, free, memory
        self._idle: dict[int, list[int]] = defaultdict(list)
        self._all: set[int] = set()

    def take(self, size: int) -> Buffer:
        """A buffer of at least `size` bytes.

        Raises:
            EnvironmentMismatch: the device has no more, also after all that is idle was freed.
        """
        size = size_class(size)
        if idle := self._idle[size]:
            return Buffer(heapq.heappop(idle), size, self._give_back)
        try:
            address = self._allocate(size)
        except CudaError as e:
            if e.code != OUT_OF_MEMORY:
                raise
            self._trim()
            address = self._last_try(size)
        self._all.add(address)
        return Buffer(address, size, self._give_back)

    def array(self, shape: Shape, dtype: np.dtype[Any], room: Shape | None = None) -> DeviceArray:
        """Uninitialised. room: the shape to have memory for, if it is to be a buffer for later ones too."""
        return DeviceArray(self.take(math.prod(room or shape) * dtype.itemsize), shape, dtype)

    def close(self) -> None:
        """Free everything: values that are still held cannot be read any more."""
        self._idle.clear()
        while self._all:
            self._free(self._all.pop())

    def _last_try(self, size: int) -> int:
        try:
            return self._allocate(size)
        except CudaError as e:
            if e.code != OUT_OF_MEMORY:
                raise
            free, total = self._memory()
            raise EnvironmentMismatch(
                f"The GPU is out of memory: {size / 2**20:.1f} MiB wanted, {free / 2**20:.0f} of {total / 2**20:.0f} MiB free "
                "and perhaps not in one piece. End other programs, or export INT4, fewer tokens or a smaller batch."
            ) from e

    def _give_back(self, address: int, size: int) -> None:
        if address in self._all:
            heapq.heappush(self._idle[size], address)

    def _trim(self) -> None:
        for idle in self._idle.values():
            while idle:
                self._all.discard(address := idle.pop())
                self._free(address)


class Device:
    """The GPU and its memory, shared by all runners of this process that are open: what one gives, another takes as it is."""

    _shared: Device | None = None

    def __init__(self) -> None:
        self.cuda = Cuda()
        self.pool = Pool(self.cuda.allocate, self.cuda.free, self.cuda.memory)
        self._users = 0
        self._uploading: list[Array] = []

    @classmethod
    def open(cls) -> Device:
        """As often as opened, it has to be closed. Raises EnvironmentMismatch where there is no GPU."""
        shared = cls._shared = cls._shared or cls()
        shared._users += 1
        return shared

    def close(self) -> None:
        self._users -= 1
        if not self._users:
            Device._shared = None
            self.pool.close()
            self.cuda.close()

    def to_device(self, array: Array) -> DeviceArray:
        """A copy on the device, there by the next `synchronize`; until then the array must not be changed."""
        value = self.pool.array(array.shape, array.dtype)
        self.write(value, array)
        return value

    def write(self, value: DeviceArray, array: Array) -> None:
        """Fill a new tensor, as `to_device` does."""
        array = np.ascontiguousarray(array)
        self.cuda.upload(value.address, array)
        self._uploading.append(array)

    def synchronize(self) -> None:
        """Wait for everything that was asked for."""
        self.cuda.synchronize()
        self._uploading.clear()

    def to_host(self, value: DeviceArray) -> Array:
        """A copy on the host."""
        array = np.empty(value.shape, value.dtype)
        self.cuda.download(array, value.address)
        return array

    def rows(self, value: DeviceArray, rows: npt.NDArray[np.int64], room: Shape | None = None) -> DeviceArray:
        """Some rows of the first axis, int64 [n], copied on the device. room: see `Pool.array`."""
        found = self.pool.array((len(rows), *value.shape[1:]), value.dtype, room)
        each = found.nbytes // max(1, len(rows))
        for place, row in enumerate(rows.tolist()):
            self.cuda.copy(found.address + place * each, value.address + row * each, each)
        return found
