"""A search as one HTML file: what was tried, what it costs and answers, what won and why the others did not."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from markupsafe import Markup

import exporter
from exporter.graphset import tokens_in_words
from exporter.report import charts
from exporter.tune import report
from exporter.tune.search import UNITS, Basis, Entry, Result
from exporter.tune.wanted import Wanted


def render(result: Result, wanted: Wanted) -> str:
    """The page. Every string is escaped; its one script is allowed by its hash."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    script = (folder / "tune.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("tune.html.j2").render(
        checkpoint=wanted.job.checkpoint,
        budgets=[b.words for b in result.budgets],
        result=result,
        finished=any(e.engine for e in result.entries),
        command=None if result.winner is None else report.command(result, wanted),
        rows=_rows(result),
        plots=_plots(result),
        script=Markup(script),  # ours, not the user's
        digest=digest,
        version=exporter.__version__,
    )


def _plots(result: Result) -> list[tuple[str, Markup]]:
    """Title and plot: of the finalists, and of everything that was asked in PyTorch."""
    found = []
    ends = [i for i, e in enumerate(result.entries) if e.engine and not e.out]
    if ends:
        spots = {i: _spot(result, i, result.basis, result.entries[i].engine) for i in ends}
        found.append(("The exported models", _drawn(result, spots, [spots[i] for i in result.front], result.basis)))
    asked = [i for i, e in enumerate(result.entries) if e.scores]
    if asked:
        basis: Basis = "roofline" if all(result.entries[i].roofline for i in asked) else "operations"
        spots = {i: _spot(result, i, basis, result.entries[i].scores) for i in asked}
        found.append(("Everything that was asked, in PyTorch", _drawn(result, spots, [], basis)))
    return found


def _drawn(result: Result, spots: dict[int, charts.Spot], front: list[charts.Spot], basis: Basis) -> Markup:
    name = {"ttft": "to the first token", "latency": "a whole answer"}[result.time]
    axis = UNITS[basis] if basis == "operations" else f"{name}, {UNITS[basis]}"
    most = next((b.most for b in result.budgets if b.name == result.time and basis != "operations"), None)
    return charts.spots(list(spots.values()), front, axis, f"Right answers in percent against {axis}", most)


def _spot(result: Result, place: int, basis: Basis, scores: tuple[float, ...]) -> charts.Spot:
    entry = result.entries[place]
    kind = "winner" if place == result.winner else entry.candidate.role
    percent, time = 100 * sum(scores) / len(scores), entry.time(basis, result.time)
    said = (
        f"{entry.candidate.spec} on {Path(entry.candidate.profile).stem}: {percent:.1f} % of {len(scores)} right, {time:.3g} "
        f"{UNITS[basis]}, {tokens_in_words(entry.tokens, entry.kept)}, {entry.memory_mib:.0f} MiB"
    )
    return charts.Spot(time, percent, place, kind, said)


def _rows(result: Result) -> list[dict[str, Any]]:
    """All candidates: the winner, those that came far, then the others."""
    order = sorted(
        range(len(result.entries)),
        key=lambda i: (i != result.winner, bool(result.entries[i].out), -result.entries[i].rung, i),
    )
    return [_row(result, i) for i in order]


def _row(result: Result, place: int) -> dict[str, Any]:
    e = result.entries[place]
    what = "winner" if place == result.winner else "on the front" if place in result.front else e.candidate.role
    return {
        "place": place,
        "what": what,
        "spec": e.candidate.spec,
        "profile": Path(e.candidate.profile).stem,
        "tokens": f"{e.tokens} → {e.kept}" if e.tokens else "–",
        "asked": len(e.engine or e.scores) or "–",
        "percent": "–" if e.percent is None else f"{e.percent:.1f}",
        "drop": "–" if e.drop is None else f"{e.drop:.1f} ± {e.error:.1f}",
        "measured": _ms(e, "measured", result.time),
        "roofline": _ms(e, "roofline", result.time),
        "memory": f"{e.memory_mib:.0f}",
        "out": e.out,
        "control": e.candidate.role == "control",
    }


def _ms(entry: Entry, basis: Basis, name: str) -> str:
    found = entry.measured if basis == "measured" else entry.roofline
    return "–" if found is None else f"{entry.time(basis, name):.2f}"
