"""The history of latency baselines as one HTML file: a plot per stage, for every device and model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import exporter
from exporter.baselines import MODEL, Baseline, Session
from exporter.report import charts


@dataclass(frozen=True)
class Section:
    """One baseline: what it is of, under which conditions, and stage → points."""

    title: str
    conditions: dict[str, str]
    stages: dict[str, list[charts.Session]]
    sessions: int


def render(profile: str, baselines: Sequence[Baseline]) -> str:
    """The page. Every string is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("history.html.j2").render(
        profile=profile, sections=[_section(b) for b in baselines], charts=charts, version=exporter.__version__
    )


def _section(baseline: Baseline) -> Section:
    told = [(number, s) for number, g in enumerate(baseline.generations) for s in g.sessions]
    names = dict.fromkeys(name for _, session in told for name in session.stages)
    stages = {name: [_point(name, n, s) for n, s in told if name in s.stages] for name in names}
    model = [baseline.conditions[k] for k in MODEL[:2] if k in baseline.conditions]
    return Section(": ".join(model), baseline.conditions, stages, len(told))


def _point(stage: str, generation: int, session: Session) -> charts.Session:
    times = session.stages[stage].openings_ms
    state = ", ".join(f"{name} {value:g}" for name, value in session.state.items())
    said = f"{session.utc}: {median(times):.3g} ms, openings {min(times):.3g} to {max(times):.3g}, EdgeTrim {session.edgetrim}"
    return charts.Session(
        session.utc[:10], median(times), min(times), max(times), generation, f"{said}, {state}" if state else said
    )
