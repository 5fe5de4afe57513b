"""Renders `ReportData` as one HTML file that needs nothing else: no network, no script, no font, pictures inside."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import exporter
from exporter.graphset import tokens_in_words
from exporter.report import charts, layers
from exporter.report._data import Latency, Quality, ReportData, Score, Timing
from exporter.report.waterfall import waterfalls


@dataclass(frozen=True)
class Key:
    """One of the four numbers on top."""

    label: str
    value: str
    detail: str
    missing: bool = False


class Footnotes:
    """Why numbers of one table are missing: a letter in the cell, the reason below the table."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def mark(self, reason: str) -> str:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return _letter(self.reasons.index(reason))

    def items(self) -> list[tuple[str, str]]:
        return [(_letter(i), reason) for i, reason in enumerate(self.reasons)]


def render(data: ReportData) -> str:
    """The report as HTML. Every string in `data` is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": in_bytes, "png": data_uri, "wide": is_wide, "ms": in_ms, "percent": in_percent}
    environment.tests["missing"] = lambda value: isinstance(value, str)
    kinds = _unique(kind for row in data.quality for kind in row.scores)
    return environment.get_template("report.html.j2").render(
        d=data,
        version=exporter.__version__,
        keys=headline(data),
        charts=charts,
        Footnotes=Footnotes,
        tokens_in_words=tokens_in_words,
        kinds=kinds,
        axis=quality_axis(data.quality),
        unreduced={kind: _score(data.quality, "unreduced", kind) for kind in kinds},
        curve_kinds=_unique(kind for c in data.curves for p in c.points for kind in p.accuracy),
        waterfalls=waterfalls(data),
        step_names=[row.stage for row in (*data.latency, data.token) if row is not None],
        layers=layers,
        ratio=ratio,
        faster=faster,
        gates=gates(data),
        idle=[stage.name for stage in data.stages if stage.built and not stage.executed],
    )


def write(data: ReportData, path: Path) -> Path:
    """Render into a file, written beside and renamed."""
    text = render(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def headline(data: ReportData) -> list[Key]:
    """Tokens, accuracy, time to first token, size: what a reader wants to know first."""
    before, after = data.unreduced_tokens, data.kept_tokens
    words = tokens_in_words(before, after)
    tokens = Key("Visual tokens", f"{before} → {after}", words[words.index("(") + 1 : -1])
    return [tokens, _accuracy(data.quality), _first_token(data.ttft), _size(data)]


def _accuracy(rows: Sequence[Quality]) -> Key:
    for variant, how in (("engine", "engine"), ("reduced", "PyTorch, reduced")):
        mine = _pooled([row for row in rows if row.variant == variant])
        if mine is None:
            continue
        parts = [how]
        if (full := _pooled([row for row in rows if row.variant == "unreduced"])) is not None:
            parts.append(f"unreduced {in_percent(full.value)}")
        for row in rows:
            if row.variant == "control" and (control := _pooled([row])) is not None:
                parts.append(f"{row.label} {in_percent(control.value)}")
        return Key("Accuracy", in_percent(mine.value), " · ".join(parts))
    return Key("Accuracy", "not measured", "no reduced variant was scored", missing=True)


def _pooled(rows: Sequence[Quality]) -> Score | None:
    """All kinds together; None where a kind is missing, so that no two numbers stand for different questions."""
    scores = [score for row in rows[:1] for score in row.scores.values()]
    real = [score for score in scores if isinstance(score, Score)]
    if not real or len(real) < len(scores):
        return None
    return Score(sum(s.correct for s in real), sum(s.n for s in real))


def _first_token(row: Latency | None) -> Key:
    label = "Time to first token"
    if row is None:
        return Key(label, "not measured", "no latency was measured", missing=True)
    for before, after, how in (
        (row.engine_unreduced, row.engine_reduced, "engine"),
        (row.reference_unreduced, row.reference_reduced, "PyTorch"),
    ):
        if isinstance(before, Timing) and isinstance(after, Timing):
            times = f"{in_ms(before.median)} → {in_ms(after.median)} ms, {how}, median"
            return Key(label, ratio(before, after) or "", times)
    return Key(label, "not measured", str(row.engine_reduced), missing=True)


def _size(data: ReportData) -> Key:
    if isinstance(data.bundle_bytes, str):
        return Key("Bundle", "not measured", data.bundle_bytes, missing=True)
    return Key("Bundle", in_bytes(data.bundle_bytes), f"{data.precision} · {data.backend} · {data.profile}")


def _score(rows: Sequence[Quality], variant: str, kind: str) -> float | None:
    for row in rows:
        score = row.scores.get(kind)
        if row.variant == variant and isinstance(score, Score):
            return score.value
    return None


def quality_axis(rows: Sequence[Quality]) -> float:
    """Where the axis of the accuracy bars begins: the ten below the lowest interval."""
    lows = [score.interval[0] for row in rows for score in row.scores.values() if isinstance(score, Score)]
    return min(int(min(lows, default=0) * 10) / 10, 0.9)


def ratio(before: Any, after: Any) -> str | None:
    """How much faster `after` is, from medians: "1.83× faster"; None where either was not measured."""
    if not isinstance(before, Timing) or not isinstance(after, Timing):
        return None
    return faster(before.median, after.median)


def faster(before: float, after: float) -> str | None:
    """Two times as a ratio, in words; None if one is zero."""
    if not before or not after:
        return None
    factor = before / after
    if 0.98 <= factor <= 1.02:
        return "the same"
    return f"{factor:.3g}× faster" if factor > 1 else f"{1 / factor:.3g}× slower"


def gates(data: ReportData) -> dict[str, int]:
    return {
        "passed": sum(row.passed is True for row in data.fidelity),
        "failed": sum(row.passed is False for row in data.fidelity),
        "open": sum(row.passed is None for row in data.fidelity),
    }


def in_bytes(value: float) -> str:
    """Decimal units, as disks and vendors count."""
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.2f} GB" if value < 100 else f"{value:.0f} GB"


def in_ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def in_percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def is_wide(image: bytes) -> bool:
    """Whether a PNG needs the page's whole width (its header holds the width at byte 16)."""
    return int.from_bytes(image[16:20], "big") > 640


def _letter(i: int) -> str:
    return chr(ord("a") + i) if i < 26 else str(i)


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
