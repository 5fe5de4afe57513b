"""Keys and values in memory that is allocated once and grows by whole blocks, for graphs that append in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exporter.backends._contract import Array
from exporter.graphset import PAD

BLOCK = 256
"""Tokens. A cache is copied once per block, when it outgrows its memory."""

Ints = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int32]


@dataclass(eq=False)
class Memory:
    """What a conversation's cache lies in, all layers of it. The same tokens are appended everywhere, so one number says how full
    it is."""

    arrays: dict[str, Array]
    """Past input → keys or values [batch, heads, capacity, head_dim], or `order` [batch, capacity]."""
    begin: dict[str, int]
    """Past input → tokens that were there when it was allocated."""
    room: int
    """Tokens that fit behind those."""
    used: int = 0
    """Tokens that somebody has written there, or is going to."""
    holders: int = 0
    """Caches that lie in it."""

    @classmethod
    def of(cls, past: Mapping[str, Array], tokens: int, spare: Memory | None = None) -> Memory:
        """A copy of a cache, keys and values [batch, heads, length, head_dim] and orders [batch, length], with room for so many
        more tokens; in `spare` if nobody holds that and it is as large."""
        room = -(-tokens // BLOCK) * BLOCK
        shapes = {name: _longer(value.shape, room) for name, value in past.items()}
        if spare is None or spare.holders or {name: array.shape for name, array in spare.arrays.items()} != shapes:
            spare = cls({name: np.empty(shape, past[name].dtype) for name, shape in shapes.items()}, {}, room)
        spare.begin = {name: value.shape[_axis(value.shape)] for name, value in past.items()}
        spare.room, spare.used = room, 0
        for name, begin in spare.begin.items():
            if begin:
                _first(spare.arrays[name], begin)[...] = past[name]
        return spare


class Grown(Mapping[str, Array]):
    """A cache: what was in a memory when it was allocated, and the first `tokens` behind that.

    Whoever goes on from the newest one appends to its memory; whoever goes on from an older one, as when two conversations
    begin alike, gets a copy. So it never changes. What is asked for by name is copied: when nobody holds a cache any more, the next
    conversation is written over it.
    """

    __slots__ = ("memory", "padding", "tokens")

    def __init__(self, memory: Memory, tokens: int, padding: Mapping[str, Counts]) -> None:
        """padding: of every `order`, how many tokens of each row are that, int32 [batch]; empty where none is."""
        self.memory, self.tokens, self.padding = memory, tokens, padding
        memory.holders += 1

    def __del__(self) -> None:
        self.memory.holders -= 1

    @classmethod
    def of(cls, past: Mapping[str, Array], tokens: int, spare: Memory | None = None) -> Grown:
        """`past` in a memory with room for so many more tokens: its own if that is free behind it, else `spare` if that is free
        and as large, else a new one."""
        if isinstance(past, Grown):
            memory = past.memory
            if past.tokens == memory.used and tokens <= memory.room - past.tokens:
                return past
            return cls(Memory.of(dict(past.shown()), tokens, spare), 0, past.padding)
        padding = {n: (value == PAD).sum(axis=1, dtype=np.int32) for n, value in past.items() if value.ndim == 2}
        return cls(Memory.of(past, tokens, spare), 0, padding if any(map(np.any, padding.values())) else {})

    def shown(self) -> Iterator[tuple[str, Array]]:
        """Names and arrays, which are not copied."""
        for name, array in self.memory.arrays.items():
            yield name, _first(array, self.length(name))

    def rows(self, rows: Ints) -> Grown:
        """A copy of some rows, int64 [n], in any order and each as often as named."""
        memory = Memory({}, {name: self.length(name) for name in self}, self.memory.room - self.tokens)
        for name, old in self.memory.arrays.items():
            array = memory.arrays[name] = np.empty((len(rows), *old.shape[1:]), old.dtype)
            for new, row in enumerate(rows.tolist()):
                end = memory.begin[name]
                _first(array[new : new + 1], end)[...] = _first(old[row : row + 1], end)
        return Grown(memory, 0, {name: count[rows] for name, count in self.padding.items()})

    def reserve(self, tokens: int) -> int:
        """Keep room, until `grown`, for so many tokens that will be appended; for how many there is."""
        found = min(tokens, self.memory.room - self.tokens)
        self.memory.used = self.tokens + found
        return found

    def grown(self, order: Ints, padding: Counts | None) -> Grown:
        """With the tokens whose keys and values have been appended.

        Args:
            order: theirs, [batch, new]. padding: int32 [batch], how many of them are that; None is none.
        """
        memory, new, counts = self.memory, order.shape[1], self.padding
        orders = [name for name, array in memory.arrays.items() if array.ndim == 2]
        for name in orders:
            length = self.length(name)
            memory.arrays[name][:, length : length + new] = order
        memory.used = self.tokens + new
        if padding is not None:
            counts = {name: counts.get(name, np.int32(0)) + padding for name in orders}
        return Grown(memory, memory.used, counts)

    def length(self, name: str) -> int:
        return self.memory.begin[name] + self.tokens

    def __getitem__(self, name: str) -> Array:
        return _first(self.memory.arrays[name], self.length(name)).copy()

    def __iter__(self) -> Iterator[str]:
        return iter(self.memory.arrays)

    def __len__(self) -> int:
        return len(self.memory.arrays)


def _axis(shape: Sequence[int]) -> int:
    """That of tokens."""
    return 1 if len(shape) == 2 else 2


def _longer(shape: Sequence[int], tokens: int) -> tuple[int, ...]:
    at = _axis(shape)
    return (*shape[:at], shape[at] + tokens, *shape[at + 1 :])


def _first(array: Array, tokens: int) -> Array:
    """Not copied."""
    found: Array = array[:, :tokens] if array.ndim == 2 else array[:, :, :tokens]
    return found
