"""From logits to tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from exporter.errors import ExportError, UsageError
from exporter.runtime.sequence import Ints

Logits = npt.NDArray[np.float32]
"""[batch, vocab]"""
Sampler = Callable[[Logits], Ints]
"""float32 [batch, vocab] → int64 [batch]. Logits that it wants to keep, it copies: the next step may write over them."""


def greedy(logits: Logits) -> Ints:
    """The most likely token; of equal ones the lower id."""
    best: Ints = logits.argmax(axis=-1)
    return best


class Sampling:
    """Draw from the most likely tokens. The same seed gives the same tokens.

    Args:
        temperature: above 0; below 1 sharpens.
        top_k: only this many of the most likely; 0 is all.
        top_p: only the fewest that are together at least this likely.
        seed: of the random numbers.
    """

    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> None:
        if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
            raise UsageError(
                f"Sampling with temperature {temperature}, top_k {top_k}, top_p {top_p}: expected a temperature above "
                "0, top_k 0 or more, top_p above 0 and at most 1. For the most likely token, do not sample."
            )
        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: Logits) -> Ints:
        scaled = logits.astype(np.float64) / self._temperature
        ranked = np.argsort(-scaled, axis=-1, kind="stable")
        if self._top_k:
            ranked = ranked[:, : self._top_k]
        best = np.take_along_axis(scaled, ranked, axis=-1)
        likely = np.exp(best - best[:, :1])
        likely /= likely.sum(axis=-1, keepdims=True)
        likely[np.cumsum(likely, axis=-1) - likely >= self._top_p] = 0
        total = np.cumsum(likely, axis=-1)
        drawn = (total <= self._random.random((len(total), 1)) * total[:, -1:]).sum(axis=-1, keepdims=True)
        picked: Ints = np.take_along_axis(ranked, drawn, axis=-1)[:, 0]
        return picked


def pick(sampler: Sampler, logits: Logits) -> list[int]:
    """The sampler's tokens, one per row. Raises ExportError: a logit that was picked is NaN."""
    picked: list[int] = sampler(logits).tolist()
    for row, token in enumerate(picked):  # argmax stops at the first NaN, so looking at the chosen logit is enough
        if math.isnan(logits.item(row, token)):
            raise _nan()
    return picked


def refuse_nan(chosen: Iterable[float]) -> None:
    """Raise ExportError if a chosen score is NaN."""
    if any(map(math.isnan, chosen)):
        raise _nan()


def _nan() -> ExportError:
    return ExportError(
        "The language model returned NaN. In FP16 that is mostly an overflow: compare with an FP32 export."
    )
