"""Successive halving: few questions to many candidates, more questions to fewer.

Source: Jamieson and Talwalkar 2016, arXiv:1502.07943. Differs: the last rung asks all questions, and what a candidate has answered is
not asked again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

ETA = 3
LEAST = 16
"""Questions below which an answer more or less decides too much."""


@dataclass(frozen=True)
class Rung:
    """enter: candidates that are asked; questions: how many each has answered when it is over; survive: candidates that go on."""

    enter: int
    questions: int
    survive: int


def schedule(candidates: int, questions: int, finalists: int, eta: int = ETA, least: int = LEAST) -> tuple[Rung, ...]:
    """Rungs from `candidates` down to `finalists`, at least one: every rung goes on with one of `eta`, and asks `eta` times as much,
    up to all questions in the last. None without candidates."""
    if candidates < 1 or questions < 1 or finalists < 1:
        return ()
    counts = [candidates]
    while counts[-1] > finalists:
        counts.append(max(finalists, ceil(counts[-1] / eta)))
    if len(counts) == 1:
        counts.append(candidates)
    last = len(counts) - 2
    asked = [max(min(least, questions), ceil(questions / eta ** (last - i))) for i in range(last + 1)]
    return tuple(Rung(*rung) for rung in zip(counts[:-1], asked, counts[1:], strict=True))


def answers(rungs: tuple[Rung, ...]) -> int:
    """Answers that a schedule takes in all."""
    before = [0, *(rung.questions for rung in rungs)]
    return sum(rung.enter * (rung.questions - asked) for rung, asked in zip(rungs, before[:-1], strict=True))
