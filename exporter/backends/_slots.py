"""A cache on the device with free slots behind it, so that an engine sees it in the same shape for many steps.

Shown as long as it is, a cache has another shape in every step: TensorRT works out all shapes anew, TensorRT-RTX looks for kernels
that fit them, and no CUDA graph can be replayed. Shown with its free slots, it keeps shape and address for `STEPS` tokens. The
order of a free slot is that of padding, which nothing attends to, and its numbers are zero. An engine returns the cache with the new
tokens behind all slots; they are copied from there into the first free ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.backends._contract import Array
from exporter.backends._device_memory import Device, DeviceArray, Shape
from exporter.graphset import PAD

STEPS = 64
"""Tokens for which a cache has slots at most. Each free one costs attention a little, each move is a copy and another CUDA graph."""


@dataclass
class _Memory:
    array: DeviceArray
    """[…, capacity, …]"""
    used: int
    """Tokens that somebody has written."""


@dataclass(frozen=True)
class Place:
    """Where a cache's tensor has its tokens. axis: theirs. most: of them that an engine takes. free: what a slot without one holds."""

    axis: int
    most: int
    free: int

    @classmethod
    def of(cls, name: str, axis: int, most: int) -> Place:
        """name: of the decode graph's input."""
        return cls(axis, most, PAD if name.startswith("past_order_") else 0)

    def capacity(self, tokens: int) -> int:
        """Slots for so many tokens, and free ones as long as an engine takes them."""
        return max(tokens, min(self.most, (tokens // STEPS + 1) * STEPS))

    def resized(self, shape: Shape, tokens: int) -> Shape:
        return (*shape[: self.axis], tokens, *shape[self.axis + 1 :])


@dataclass(slots=True, eq=False)
class Slots:
    """The first `length` tokens in a memory.

    Whoever goes on from the newest ones writes behind them; whoever goes on from older ones, as when two conversations begin alike,
    gets a copy. So this never changes.
    """

    place: Place
    memory: _Memory
    length: int

    @property
    def shape(self) -> Shape:
        return self.place.resized(self.memory.array.shape, self.length)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.memory.array.dtype

    @property
    def shown(self) -> DeviceArray:
        """With its free slots, as an engine takes it."""
        return self.memory.array

    @classmethod
    def of(cls, device: Device, place: Place, past: Slots | DeviceArray, present: DeviceArray, tokens: int) -> Slots:
        """`past`, which is `alone`, and behind it the last `tokens` of what an engine returned that was shown it: in the memory of
        `past` if that has free slots, else in a new one."""
        length = past.shape[place.axis]
        if isinstance(past, Slots) and length + tokens <= past.shown.shape[place.axis]:
            memory = past.memory
        else:
            shown = past.shown if isinstance(past, Slots) else past
            memory = _moved(device, place, shown, length, length + tokens)
        copy_tokens(device, place.axis, present, present.shape[place.axis] - tokens, memory.array, length, tokens)
        memory.used = length + tokens
        return cls(place, memory, memory.used)

    def alone(self, device: Device) -> Slots:
        """These tokens where nobody has written behind them: an engine attends to all that is in a memory."""
        if self.memory.used == self.length:
            return self
        return Slots(self.place, _moved(device, self.place, self.shown, self.length, self.length), self.length)

    def dense(self, device: Device) -> DeviceArray:
        """A copy without free slots."""
        array = device.pool.array(self.shape, self.dtype)
        copy_tokens(device, self.place.axis, self.shown, 0, array, 0, self.length)
        return array

    def numpy(self, device: Device) -> Array:
        """A copy on the host."""
        found: Array = device.to_host(self.shown)
        return found[(slice(None),) * self.place.axis + (slice(self.length),)]

    def rows(self, device: Device, rows: npt.NDArray[np.int64]) -> Slots:
        """A copy of some rows of the first axis, int64 [n]."""
        room = self.place.resized((len(rows), *self.shown.shape[1:]), self.place.most)
        return Slots(self.place, _Memory(device.rows(self.shown, rows, room), self.memory.used), self.length)


def _moved(device: Device, place: Place, shown: DeviceArray, length: int, tokens: int) -> _Memory:
    """The first `length` tokens in a memory of their own, with slots for `tokens` and free ones behind."""
    capacity = place.capacity(tokens)
    shape, room = (place.resized(shown.shape, n) for n in (capacity, max(capacity, place.most)))
    array = device.pool.array(shape, shown.dtype, room)
    if place.free:
        device.write(array, np.full(shape, place.free, shown.dtype))
    else:
        device.cuda.clear(array.address, array.nbytes)
    copy_tokens(device, place.axis, shown, 0, array, 0, length)
    return _Memory(array, length)


def copy_tokens(
    device: Device, axis: int, source: DeviceArray, start: int, target: DeviceArray, at: int, tokens: int
) -> None:
    """Copy tokens [start : start + tokens] along an axis to [at : at + tokens] of a tensor that differs in that axis only."""
    each = math.prod(source.shape[axis + 1 :]) * source.dtype.itemsize
    device.cuda.copy_rows(
        target.address + at * each, target.shape[axis] * each,
        source.address + start * each, source.shape[axis] * each,
        tokens * each, math.prod(source.shape[:axis]),
    )  # fmt: skip
