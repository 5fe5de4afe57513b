"""Decode steps of a graph that appends in place: what differs from the step before is counted up in the memory that is bound.

A processor that has just run a graph has thrown the interpreter out of its caches: each line of Python between two runs costs two or three
times what it costs in a loop of its own. So there are few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from exporter.backends._contract import Array, Runner, Steps
from exporter.backends._ort_append import Appending
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
        self._left, self._count = 0, 0

    @property
    def past(self) -> Mapping[str, Any]:
        self._settle()
        return self._past

    def __call__(self, tokens: Sequence[int]) -> dict[str, Any]:
        appending = self._appending
        if not self._left or appending.user is not self:
            self._settle()
            found = super().__call__(tokens)
            self._left = appending.hand_over(self, self._past, self._feeds["order"])
            self._bound = self._rows(appending.embeds)
            return found
        for embeds, token in zip(self._bound, tokens, strict=True):
            embeds[...] = self._words[token]
        try:
            logits = appending.again(self._count)
        except Exception as e:
            raise self._failed(e, self._feeds) from e
        self._count += 1
        self._left -= 1
        self._past.memory.used += 1
        return {"logits": logits}

    def _settle(self) -> None:
        """Write down how far it has come."""
        if self._count:
            self._move(np.full_like(self._moves, self._count))
            self._past = Grown(self._past.memory, self._past.tokens + self._count, self._past.padding)
            self._count = 0
