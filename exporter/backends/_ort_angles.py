"""What a graph that appends in place rotates by (`exporter.flavours.ort`): tables of cos and sin, made beside it.

A step rotates one token by where it stands, and the next one by one more: a table for as many positions as the cache has
places serves hundreds of steps, and none of them has a node for it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from exporter.backends._contract import Array
from exporter.errors import VerificationError
from exporter.flavours._contract import ANGLES

FIRST = 256
"""Positions whose rows are made at once, at least."""


class Angles:
    """The model in a graph's metadata. Called with positions int64, [batch, seq] or [axes, batch, seq], it returns per input of the
    graph float32 [batch * seq, head_dim / 2].

    A token's row depends on its own positions alone. So where there is one axis, the rows of positions 0, 1, 2 … are made once, and looked
    up.
    """

    def __init__(self, metadata: Mapping[str, str], opened: Callable[[bytes], Any]) -> None:
        """opened: a serialised model → session."""
        if ANGLES not in metadata:
            raise VerificationError(f"The graph has no '{ANGLES}': an earlier version exported it. Run export again.")
        self._session = opened(base64.b64decode(metadata[ANGLES]))
        (positions,) = self._session.get_inputs()
        self.axes: list[Any] = list(positions.shape)
        """Of the positions, as a graph's inputs have them."""
        self._names: Sequence[str] = [value.name for value in self._session.get_outputs()]
        self._known: Sequence[Array] = ()
        self._count = 0

    def __call__(self, positions: Array) -> dict[str, Array]:
        if positions.ndim > 2:
            found: Sequence[Array] = self._run(positions)
        else:
            highest = int(positions.max())
            if highest >= self._count:
                self._count = max(FIRST, 1 << highest.bit_length())
                self._known = self._run(np.arange(self._count)[None])
            found = [table[positions.reshape(-1)] for table in self._known]
        return dict(zip(self._names, found, strict=True))

    def _run(self, positions: Array) -> Sequence[Array]:
        found: Sequence[Array] = self._session.run(self._names, {"position_ids": np.ascontiguousarray(positions)})
        return found


class Tables:
    """Memory for tables, bound, and what lies in it.

    Args:
        bind: (input, array) → bound.
    """

    def __init__(self, angles: Angles, bind: Callable[[str, Array], None]) -> None:
        self._angles, self._bind = angles, bind
        self._arrays: dict[str, Array] = {}
        self._rows = 0
        self._first, self._end = 0, 0

    def turn(self, positions: Array, longest: int, places: Array) -> None:
        """See to it that tables hold what tokens are rotated by.

        Args:
            positions: int64 [..., batch, seq] of new tokens. longest: places that a cache has; no table may have fewer rows.
            places: int64 [batch, seq], gets every token's row.
        """
        if positions.shape[-1] > 1 or not self._stepped(positions, longest, places):
            self._fill(positions, max(longest, places.size))
            places[...] = np.arange(places.size).reshape(places.shape)
            self._end = self._first

    def left(self, places: Array) -> int:
        """For how many more steps the table has rows, one token per row of `places` each; none if it is a run's own tokens'."""
        return max(self._end - self._first - 1 - int(places.max()), 0)

    def _stepped(self, positions: Array, longest: int, places: Array) -> bool:
        """One token per row, by its position in a table of consecutive ones; False where a token's positions differ by axis."""
        wanted = positions.ravel().tolist()
        low, high = min(wanted), max(wanted)
        if not self._first <= low <= high < self._end or longest > self._rows:
            rows = max(longest, high - low + 1)
            consecutive = np.arange(low, low + rows)[:, None]
            self._fill(np.broadcast_to(consecutive, (*positions.shape[:-2], rows, 1)), rows)
            self._first, self._end = low, low + rows
        of_rows = wanted[: len(places)]
        if low == high:
            places.fill(low - self._first)
        else:
            np.subtract(positions if positions.ndim == 2 else positions[0], self._first, out=places)
        return wanted == of_rows * (len(wanted) // len(of_rows))

    def _fill(self, positions: Array, rows: int) -> None:
        """Tables of positions [..., batch, seq], with room for so many rows."""
        found = self._angles(positions)
        if rows > self._rows:
            self._rows = 0
            self._arrays = {name: np.zeros((rows, table.shape[1]), table.dtype) for name, table in found.items()}
            for name, array in self._arrays.items():
                self._bind(name, array)
            self._rows = rows
        for name, table in found.items():
            self._arrays[name][: len(table)] = table
