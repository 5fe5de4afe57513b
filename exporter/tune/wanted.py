"""What a user asks a search for."""

from __future__ import annotations

from dataclasses import dataclass

from exporter.job import Job
from exporter.tune.budget import Budget
from exporter.tune.measure import Asking


@dataclass(frozen=True)
class Wanted:
    """What was asked for. job: its reductions and profile do not matter. rounds, threads: of the timing."""

    job: Job
    profiles: tuple[str, ...]
    methods: tuple[str, ...]
    keep: tuple[float, ...]
    budgets: tuple[Budget, ...]
    finalists: int
    asking: Asking
    rounds: int
    threads: int | None
