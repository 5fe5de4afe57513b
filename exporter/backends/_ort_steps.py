"""Decode steps of a graph that appends in place: what differs from the step before is counted up in the memory that is bound.

A processor that has just run a graph has thrown the interpreter out of its caches: each line of Python between two runs costs two or three
times what it costs in a loop of its own. So there are few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from exporter.backends._contract import Array, Runner, Steps
from exporter.backends._ort_append import NOTHING, Appending
from exporter.backends._ort_cache import Grown

Failed = Callable[[Exception, Mapping[str, Any]], Exception]
"""(what went wrong, feeds) → what to raise."""


class AppendingSteps(Steps):
    """As `Steps`, for rows of which none has ended. The first run, and each that needs other memory, goes by `Runner.grow`; so does
    one before which somebody else has run the graph."""

    _past: Grown

    def __init__(
        self, runner: Runner, appending: Appending, failed: Failed, feeds: Mapping[str, Array], words: Array,
        past: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(runner, feeds, words, past)
        self._appending, self._failed = appending, failed
        self._handed, self._count = NOTHING, 0

    @property
    def past(self) -> Mapping[str, Any]:
        self._settle()
        return self._past

    def __call__(self, tokens: Sequence[int]) -> Array:
        most, rows, counters, logits = self._handed
        count, appending = self._count + 1, self._appending
        if count > most or appending.user is not self:
            return self._anew(tokens)
        for row, token in enumerate(tokens):
            rows[row][...] = self._words[token]
        for array, row, begin in counters:
            array[row] = begin + count
        try:
            appending.run()
        except Exception as e:
            appending.user = None
            raise self._failed(e, self._feeds) from e
        self._count = count
        return logits

    def _anew(self, tokens: Sequence[int]) -> Array:
        self._settle()
        logits = super().__call__(tokens)
        self._handed = self._appending.hand_over(self, self._past, self._words.shape[1])
        return logits

    def _settle(self) -> None:
        """Write down how far it has come, and give back the room that is left."""
        if self._handed.most:
            count, self._count, self._handed = self._count, 0, NOTHING
            self._past = self._past.grown(self._feeds["order"] + np.arange(count), None)
            self._move(np.full_like(self._moves, count))
