"""The answer is a right one, case and surrounding space aside."""

from __future__ import annotations

from collections.abc import Sequence


def exact(answer: str, expected: Sequence[str]) -> float:
    given = answer.strip().casefold()
    return float(any(given == e.strip().casefold() for e in expected))


METRIC = exact
