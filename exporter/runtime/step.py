"""One token per row, again and again, behind a cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.backends._contract import Array, Runner
from exporter.errors import UsageError
from exporter.graphset import GraphSet
from exporter.runtime.cache import Cache
from exporter.runtime.sampling import Logits


class Stepping:
    """Runs the decode graph for the rows of a cache that have not ended. A context manager: meanwhile the cache is empty.

    Args:
        runner: the decode graph's. embedding: [vocab, hidden].
        active: [rows]; rows that are False have ended: what they are fed is never attended to. None is all.
    """

    def __init__(
        self, runner: Runner, graphs: GraphSet, embedding: Array, cache: Cache, active: npt.NDArray[np.bool_] | None
    ) -> None:
        text, (positions, order) = graphs.text, cache.next(active)
        axes = () if text.position_axes == 1 else (text.position_axes,)
        rows = len(order)
        feeds: dict[str, Array] = {
            "inputs_embeds": np.zeros((rows, 1, text.width)),
            "position_ids": np.broadcast_to(positions[:, None], (*axes, rows, 1)),
            "order": order[:, None],
        }
        if graphs.sized:
            feeds["size"] = np.ones((rows, 1))
        if graphs.reaches:
            feeds["reach"] = order[:, None]
        kinds = runner.inputs
        own = {name: np.array(value, kinds.get(name, value.dtype), order="C") for name, value in feeds.items()}
        self._graphs, self._cache, self._active = graphs, cache, active
        self._steps = runner.steps(own, embedding, cache.past)
        self._first, self._count = int(positions.max()), 0
        self._most = (text.longest or math.inf) - self._first

    def __enter__(self) -> Stepping:
        self._cache.past = {}  # or it would be held twice
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cache, count = self._cache, self._count
        cache.past = self._steps.past
        cache.advance(count if self._active is None else self._active.astype(np.int64) * count)

    @property
    def found(self) -> Mapping[str, Any]:
        """What the last run returned beside logits and cache."""
        return self._steps.found

    def __call__(self, tokens: Sequence[int]) -> Logits:
        """Logits [rows, vocab] behind one more token per row. The next call may write over them."""
        if self._count >= self._most:
            check_longest(self._first + self._count, self._graphs)
        logits = self._steps(tokens)
        self._count += 1
        return logits


def check_longest(last: int, graphs: GraphSet) -> None:
    """Raise UsageError for a position that the model does not have. last: the highest of new tokens."""
    if last >= (graphs.text.longest or math.inf):
        raise UsageError(
            f"The conversation comes to {last + 1} tokens; this model has positions for {graphs.text.longest}. Ask for less."
        )
