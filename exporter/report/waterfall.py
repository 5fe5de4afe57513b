"""Where the time of one answer goes: stage after stage, then a step per further token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.report._data import Latency, ReportData, Timing

RUNTIMES = {"engine": "Engine", "reference": "PyTorch"}
KINDS = ("unreduced", "reduced")
NOT_UNREDUCED = ("question", "reduce")
"""Stages that a model need not have without reduction."""


@dataclass(frozen=True)
class Step:
    """One stage, `times` after one another, the first of which begins `start_ms` after the picture came."""

    stage: str
    start_ms: float
    each_ms: float
    times: int = 1

    @property
    def ms(self) -> float:
        return self.times * self.each_ms


@dataclass(frozen=True)
class Answer:
    """One variant's. missing: why there are no steps."""

    kind: str
    steps: list[Step]
    missing: str = ""

    @property
    def ms(self) -> float:
        return sum(step.ms for step in self.steps)


@dataclass(frozen=True)
class Waterfall:
    """The answers of one runtime, which share an axis."""

    runtime: str
    answers: list[Answer]

    @property
    def most_ms(self) -> float:
        return max(answer.ms for answer in self.answers)


def waterfalls(data: ReportData) -> list[Waterfall]:
    """A waterfall for each runtime, of the medians of the stages; none where nothing was timed."""
    if not data.latency:
        return []
    return [
        Waterfall(name, [_answer(data.latency, data.token, data.answer_tokens, runtime, kind) for kind in KINDS])
        for runtime, name in RUNTIMES.items()
    ]


def _answer(stages: Sequence[Latency], token: Latency | None, tokens: int, runtime: str, kind: str) -> Answer:
    steps: list[Step] = []
    for row in [*stages, *([token] if token is not None and tokens > 1 else [])]:
        found = getattr(row, f"{runtime}_{kind}")
        if isinstance(found, Timing):
            began = steps[-1].start_ms + steps[-1].ms if steps else 0.0
            steps.append(Step(row.stage, began, found.median, tokens - 1 if row is token else 1))
        elif kind == "reduced" or row.stage not in NOT_UNREDUCED:
            return Answer(kind, [], found)
    return Answer(kind, steps)
