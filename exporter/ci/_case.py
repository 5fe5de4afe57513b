"""What a gate found of one thing, as CI systems count: a test case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "undecided"]


@dataclass(frozen=True)
class Case:
    """group: "latency", "fidelity" or "quality". message: what was found, in a sentence."""

    group: str
    name: str
    outcome: Outcome
    message: str
