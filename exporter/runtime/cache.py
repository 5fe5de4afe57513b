"""What a conversation has so far: keys and values as the runner's own values, and where the next token stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.backends._contract import Runner
from exporter.graphset import PAD
from exporter.runtime.sequence import Ints
from exporter.runtime.shrink import Shrunk


@dataclass
class Cache:
    """Everything a conversation has so far. `Generator.step` and `extend` change it in place."""

    past: Mapping[str, Any]
    """The decode graph's `past_*` inputs, as its runner gave them."""
    next_position: Ints
    """[batch]"""
    next_order: Ints
    """[batch]"""
    pending: list[list[int]]
    """Per row: tokens generated but not run yet, so not in `past`. An eos is never among them."""
    shrunk: Shrunk | None = None
    """Where a reduction goes on while decoding."""

    def places(self, real: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """Position ids and order of new tokens, both int64 [batch, new]. real: [batch, new], False where padded."""
        count = np.cumsum(real, axis=1) - 1
        positions = np.where(real, self.next_position[:, None] + count, 0)
        return positions, np.where(real, self.next_order[:, None] + count, PAD)

    def next(self, active: npt.NDArray[np.bool_] | None = None) -> tuple[Ints, Ints]:
        """Position ids and order of one new token per row, both int64 [batch]. active: [batch], False where it is padding."""
        if active is None:
            return self.next_position, self.next_order
        return np.where(active, self.next_position, 0), np.where(active, self.next_order, PAD)

    def rows(self, rows: Ints, runner: Runner) -> Cache:
        """A cache of its own with rows of this one, int64 [n], in any order and each as often as named. runner: the decode graph's."""
        pending = [list(self.pending[row]) for row in rows.tolist()]
        past, shrunk = runner.rows(self.past, rows), self._shrunk(rows, runner)
        return Cache(past, self.next_position[rows], self.next_order[rows], pending, shrunk)

    def _shrunk(self, rows: Ints, runner: Runner) -> Shrunk | None:
        of = self.shrunk
        if of is None:
            return None
        wanted = None if of.wanted is None else of.wanted[rows]
        row, kept = (runner.gather(value, rows) for value in (of.row, of.kept))
        return replace(of, row=row, kept=kept, wanted=wanted, cuts=list(of.cuts))

    def advance(self, new: Ints | int) -> None:
        """new: [batch], real tokens that every row has now run, or how many each has."""
        self.next_position, self.next_order = self.next_position + new, self.next_order + new
