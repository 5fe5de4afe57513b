"""What a search found, as data: the record, the winner, the command that makes it."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from typing import Any

from exporter import __version__
from exporter.tune.search import UNITS, Entry, Result
from exporter.tune.wanted import Wanted

PAGE = "tune.html"
WINNER = "winner.json"


def command(result: Result, wanted: Wanted) -> str:
    """The `edgetrim run` that makes the winner, as a line for a shell. Asks for a winner."""
    assert result.winner is not None
    candidate = result.entries[result.winner].candidate
    job = replace(wanted.job, reductions=candidate.reductions, profile=candidate.profile)
    asked = [] if wanted.asking.path is None else ["--questions", str(wanted.asking.path)]
    return shlex.join(["edgetrim", "run", *job.words(), *asked, "--output", "winner"])


def record(result: Result, wanted: Wanted) -> dict[str, Any]:
    """Everything, for `--json`."""
    return {
        "checkpoint": wanted.job.checkpoint,
        "budgets": {b.name: b.most for b in result.budgets},
        "rungs": {profile: [asdict(r) for r in rungs] for profile, rungs in result.rungs.items()},
        "time": {"of": result.time, "unit": UNITS[result.basis]},
        "entries": [entry(e) for e in result.entries],
        "left_out": [asdict(left) for left in result.left_out],
        "front": [result.entries[i].candidate.spec for i in result.front],
        "winner": None if result.winner is None else winner(result, wanted),
    }


def entry(found: Entry) -> dict[str, Any]:
    """One candidate; scores as how many were asked and how many right, in PyTorch and of the exported model."""
    candidate = found.candidate
    return {
        "reductions": list(candidate.reductions), "profile": candidate.profile, "role": candidate.role,
        "out": found.out or None, "rung": found.rung, "visual_tokens": {"before": found.tokens, "kept": found.kept},
        "memory_mib": found.memory_mib, "gflop_to_first_token": found.gflop,
        "roofline": None if found.roofline is None else asdict(found.roofline),
        "measured": None if found.measured is None else asdict(found.measured),
        "pytorch": _share(found.scores), "exported": _share(found.engine), "executed": found.where or None,
        "points_lost": found.drop, "points_lost_error": found.error,
    }  # fmt: skip


def _share(scores: tuple[float, ...]) -> dict[str, float] | None:
    return {"asked": len(scores), "right": sum(scores)} if scores else None


def winner(result: Result, wanted: Wanted) -> dict[str, Any]:
    """winner.json: the reductions, the profile, what is known of them, and the command."""
    assert result.winner is not None
    return {
        "edgetrim": __version__,
        "checkpoint": wanted.job.checkpoint,
        **entry(result.entries[result.winner]),
        "budgets": {b.name: b.most for b in result.budgets},
        "warnings": list(result.warnings),
        "command": command(result, wanted),
    }
