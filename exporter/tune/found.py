"""What a search finds out, as a journal keeps it: made by `measure`, and checked when it is read, as it may be of another hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isfinite


@dataclass(frozen=True)
class Refused:
    """left_out: why it does not fit."""

    left_out: str


class _Numbers:
    """None of the numbers is negative, infinite or none at all. Raises ValueError."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not (isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} is {value}, expected a finite number from 0 on")


@dataclass(frozen=True)
class Cost(_Numbers):
    """tokens, kept: visual tokens. gflop: to the first token. ttft_ms, latency_ms: rooflines, to the first token and of an answer; None
    where peaks or bandwidth are not known. refused: why the device cannot run it, or ""."""

    tokens: int
    kept: int
    memory_mib: float
    gflop: float
    ttft_ms: float | None
    latency_ms: float | None
    refused: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ttft_ms is None) != (self.latency_ms is None):
            raise ValueError("ttft_ms and latency_ms are known together or not at all")


Scores = tuple[float, ...]
"""One per question, each 0..1."""


@dataclass(frozen=True)
class Finished:
    """where: in words, what answered; own: whether that is what the profile runs, so that its time means something."""

    scores: Scores
    where: str
    own: bool


@dataclass(frozen=True)
class Timings(_Numbers):
    """Median milliseconds to the first token, and per further one."""

    ttft: float
    decode: float


def check_scores(scores: Scores, questions: int) -> None:
    """Raises ValueError: they are not one per question, or not shares."""
    check_count(scores, questions, "scores")
    for place, score in enumerate(scores):
        if not 0 <= score <= 1:
            raise ValueError(f"score {place + 1} is {score}, expected 0 to 1")


def check_count(found: Sequence[object], wanted: int, what: str) -> None:
    """Raises ValueError."""
    if len(found) != wanted:
        raise ValueError(f"there are {len(found)} {what}, expected {wanted}")
