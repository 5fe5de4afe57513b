"""What the verbs say about gates: as data, as tables, and as test cases for CI systems."""

from __future__ import annotations

from collections.abc import Mapping
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.ci._case import Case, Outcome
from exporter.cli._output import table
from exporter.cli._results import STAGES

if TYPE_CHECKING:
    from rich.console import RenderableType

    from exporter.baselines import Baseline
    from exporter.gate import Finding
    from exporter.stages.check import Check

OUTCOMES: dict[str, Outcome] = {"slower": "failed", "not slower": "passed", "cannot tell": "undecided"}


def check(folder: Path, checked: Check) -> tuple[dict[str, Any], RenderableType]:
    """A latency check, as data and as a table."""
    data = {
        "folder": folder,
        "baseline": checked.baseline,
        "kind": checked.kind,
        "executed": checked.executed,
        "verdict": checked.verdict,
        "latency_slowdown_max": 100 * checked.limit,
        "sessions": checked.sessions,
        "stages": checked.stages,
    }
    rows = [
        (
            STAGES.get(s.stage, s.stage),
            f"{s.baseline_ms:.2f}",
            f"{s.candidate_ms:.2f}",
            _percent(s.candidate_ms / s.baseline_ms - 1 if s.finding is None else s.finding.slowdown),
            None if s.finding is None else _interval(s.finding),
            "too short to judge" if s.finding is None else s.finding.verdict,
        )
        for s in checked.stages
    ]
    how = "timed in turn" if checked.kind == "paired" else "stored"
    title = f"Latency against {checked.baseline}: {checked.verdict}"
    note = (
        f"{checked.sessions} sessions, {how}; {100 * checked.limit:g} % slower is allowed. Runs on: {checked.executed}"
    )
    return data, table(
        title, ("stage", ">ms before", ">ms now", ">change", ">surely within", "verdict"), rows, note=note
    )


def latency_cases(checked: Check) -> list[Case]:
    return [
        Case("latency", STAGES.get(s.stage, s.stage), OUTCOMES[s.finding.verdict], _sentence(s.finding, checked))
        for s in checked.stages
        if s.finding is not None
    ]


def _sentence(finding: Finding, checked: Check) -> str:
    if isinf(finding.high):
        found = "too few sessions to know how they differ"
    else:
        found = f"{_percent(finding.slowdown)} ({_interval(finding)})"
    if finding.verdict == "cannot tell":
        return f"cannot tell after {finding.sessions} session{'s' if finding.sessions > 1 else ''}: {found}; {_what_would(finding, checked)}"
    return f"{found}, {100 * checked.limit:g} % is allowed"


def _what_would(finding: Finding, checked: Check) -> str:
    """How a verdict could be had."""
    stored = checked.kind == "stored"
    if finding.needed is None:
        return (
            "sessions differ too much for any number of them; compare in turn with --against"
            if stored
            else "this machine is too busy for any number of sessions; let nothing else run on it"
        )
    more = finding.needed - finding.sessions
    runs = "1 more" if more == 1 else f"{more} more"
    return f"{runs} with `bench --save-baseline` would" if stored else f"{runs} (--sessions {finding.needed}) would"


def accuracy_cases(record: Mapping[str, Any]) -> list[Case]:
    """Every gate of a validation."""
    stages = [
        Case(
            "fidelity",
            row["stage"],
            "passed" if row["passed"] else "failed",
            f"{row['gate']}; found {row['cosine'] if row['agreement'] is None else row['agreement']:.4f}",
        )
        for row in record["fidelity"]
        if row["passed"] is not None
    ]
    return stages + [
        Case("quality", gate["name"], "passed" if gate["passed"] else "failed", gate["words"])
        for gate in record.get("gates", [])
    ]


def saved(path: Path, baseline: Baseline) -> tuple[dict[str, Any], str]:
    """What was stored, and where."""
    from exporter.gate import FEWEST_STORED

    last = baseline.generations[-1]
    count = len(last.sessions)
    freedom = sum(len(g.sessions) - 1 for g in baseline.generations)
    more = FEWEST_STORED - 1 - freedom
    text = f"Stored as session {count} of {path}.\n"
    if count == 1 and len(baseline.generations) > 1:
        text += "The bundle is another one than before: it is what checks compare with from now on.\n"
    if more > 0:
        text += f"`bench --check` needs {more} more: how much sessions differ is not known before.\n"
    data = {"baseline": path, "sessions": count, "generations": len(baseline.generations), "session": last.sessions[-1]}
    return data, text.rstrip()


def _interval(finding: Finding) -> str | None:
    return None if isinf(finding.high) else f"{_percent(finding.low)} to {_percent(finding.high)}"


def _percent(value: float) -> str:
    """ "+4.2 %" is slower."""
    return f"{100 * value:+.1f} %"
