"""Beam search, as transformers' `generate(num_beams=N, do_sample=False)` does it.

Each step looks at the most likely continuations of a row's beams, more of them than there are beams, so that enough are
left when some end. Of the best `count` those that end are finished; their score is the sum of their tokens' log
probabilities over length ** length_penalty. Beams are rows of a cache, so a beam that goes on from another takes its row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from exporter.errors import UsageError
from exporter.runtime.cache import Cache
from exporter.runtime.sampling import Logits, refuse_nan
from exporter.runtime.sequence import Ints

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Beams:
    """How to search.

    Args:
        count: beams per row, at least 2.
        length_penalty: above 0 favours long answers, below 0 short ones; 0 compares plain sums.
        early_stopping: stop as soon as `count` answers are finished; else when the best beam, at its present length, cannot
            beat the worst of them any more.
    """

    count: int
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        if self.count < 2:
            raise UsageError(f"Beam search with {self.count} beams: expected 2 or more. One beam is `greedy`.")


@dataclass(frozen=True)
class Found:
    """A finished answer."""

    tokens: list[int]
    """With the eos that ended it, if one did."""
    score: float


class Model(Protocol):
    """What is searched: `Generator`."""

    def step(self, cache: Cache, tokens: Ints) -> Logits: ...

    def rows(self, cache: Cache, rows: Ints) -> Cache: ...


def search(
    model: Model, logits: Logits, cache: Cache, beams: Beams, max_new_tokens: int, eos: Sequence[int],
    took_ms: list[float] | None = None,
) -> list[list[Found]]:  # fmt: skip
    """Continue every row of a cache, which stays as it is.

    Args:
        logits: [batch, vocab] behind the cache.
        max_new_tokens: most tokens of an answer; one that is as long is finished.
        took_ms: gets the milliseconds of every step.
    Returns:
        Per row the finished answers, best first, at most `beams.count`.
    Raises:
        UsageError: a vocabulary of fewer tokens than one step looks at. ExportError: the model returned NaN.
    """
    live = [(row, _Row(beams, max_new_tokens, eos)) for row in range(len(logits))]
    found: list[list[Found]] = [[] for _ in live]
    while True:
        scores, parents, tokens, still = _log_softmax(logits), [], [], []
        each, begin = len(scores) // len(live), time.perf_counter()
        for place, (row, state) in enumerate(live):
            first = place * each
            state.grow(scores[first : first + each])
            if state.done:
                found[row] = state.finished
            else:
                still.append((row, state))
                parents += [first + beam for beam in state.parents]
                tokens += [beam[-1] for beam in state.beams]
        if not still:
            return found
        if parents != list(range(len(scores))):
            cache = model.rows(cache, np.array(parents))
        live, logits = still, model.step(cache, np.array(tokens))
        if took_ms is not None:
            took_ms.append((time.perf_counter() - begin) * 1e3)


class _Row:
    """The beams of one row of the batch."""

    def __init__(self, beams: Beams, max_new_tokens: int, eos: Sequence[int]) -> None:
        self._how, self._longest, self._eos = beams, max_new_tokens, eos
        self._looks_at = beams.count * max(2, 1 + len(eos))
        self._scores: Floats = np.zeros(1, np.float32)
        self.beams: list[list[int]] = [[]]
        self.parents: list[int] = []
        """Per beam, the one that it goes on from."""
        self.finished: list[Found] = []
        self.done = False

    def grow(self, log_probs: Floats) -> None:
        """One token more. log_probs: [beams, vocab]"""
        count, vocab = self._how.count, log_probs.shape[1]
        if log_probs.size < self._looks_at:
            raise UsageError(
                f"Beam search with {count} beams looks at {self._looks_at} tokens a step; the vocabulary has {vocab}."
            )
        sums = (self._scores[:, None] + log_probs).ravel()
        best = _top(sums, self._looks_at)
        parents, tokens, scores = (best // vocab).tolist(), (best % vocab).tolist(), sums[best]
        length = len(self.beams[0]) + 1
        over = float(length) ** self._how.length_penalty
        ends = np.isin(best % vocab, self._eos) | (length == self._longest)
        ended = [
            Found([*self.beams[parents[i]], tokens[i]], float(scores[i]) / over)
            for i in np.flatnonzero(ends[:count]).tolist()
        ]
        self.finished = sorted([*self.finished, *ended], key=lambda answer: -answer.score)[:count]
        going = np.flatnonzero(~ends)[:count].tolist()
        self.parents = [parents[i] for i in going]
        self.beams = [[*self.beams[parents[i]], tokens[i]] for i in going]
        self._scores = scores[going]
        self.done = not going or (
            len(self.finished) == count
            and (self._how.early_stopping or float(scores[going[0]]) / over <= self.finished[-1].score)
        )


def _top(values: Floats, count: int) -> Ints:
    """Places of the largest values, best first; of equal ones the lower place."""
    least = np.partition(values, -count)[-count]
    above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
    places = np.concatenate([above, equal[: count - len(above)]])
    found: Ints = places[np.lexsort((places, -values[places]))]
    return found


def _log_softmax(logits: Logits) -> Floats:
    best = logits.max(axis=-1, keepdims=True)
    total: npt.NDArray[Any] = np.exp(logits - best).sum(axis=-1, keepdims=True)
    refuse_nan(total.ravel())
    found: Floats = logits - best - np.log(total)
    return found
