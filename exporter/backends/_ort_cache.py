"""Keys and values in memory that is allocated once and grows by whole blocks, for graphs that append in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.backends._contract import Array

BLOCK = 256
"""Tokens. A cache is copied once per block, when it outgrows its memory."""


@dataclass
class _Memory:
    array: Array
    """[batch, heads, capacity, head_dim]"""
    value: Any
    """An OrtValue of the same memory."""
    used: int = 0
    """Tokens that somebody has written."""


@dataclass(slots=True, eq=False)
class Held:
    """The first `length` tokens in a memory: what a runner gives for a key or value that it appends to in place.

    Whoever goes on from the newest one appends to its memory; whoever goes on from an older one, as when two conversations
    begin alike, gets a copy. So a `Held` never changes.
    """

    memory: _Memory
    length: int

    @property
    def array(self) -> Array:
        """[batch, heads, length, head_dim], not copied."""
        found: Array = self.memory.array[:, :, : self.length]
        return found

    @property
    def room(self) -> int:
        """Tokens that fit behind it."""
        found: int = self.memory.array.shape[2] - self.length
        return found

    @property
    def value(self) -> Any:
        """The OrtValue, as long as its memory."""
        return self.memory.value

    @classmethod
    def with_room(cls, past: Held | Array, tokens: int, make: Callable[[Array], Any]) -> Held:
        """`past` in a memory with room for so many more tokens: its own if that is free behind it, else a new one.

        make: array → OrtValue of the same memory.
        """
        if isinstance(past, Held):
            if past.memory.used == past.length and tokens <= past.room:
                return past
            past = past.array
        batch, heads, length, head_dim = past.shape
        array = np.empty((batch, heads, -(-(length + tokens) // BLOCK) * BLOCK, head_dim), past.dtype)
        array[:, :, :length] = past
        return cls(_Memory(array, make(array), length), length)

    def grown(self, tokens: int) -> Held:
        """With the tokens that a run has appended."""
        self.memory.used = self.length + tokens
        return Held(self.memory, self.memory.used)

    def rows(self, rows: npt.NDArray[np.int64], make: Callable[[Array], Any]) -> Held:
        """A copy of some rows, int64 [n], in any order and each as often as named."""
        array = np.empty((len(rows), *self.memory.array.shape[1:]), self.memory.array.dtype)
        for new, row in enumerate(rows.tolist()):
            array[new, :, : self.length] = self.memory.array[row, :, : self.length]
        return Held(_Memory(array, make(array), self.length), self.length)
