"""Charts as inline SVG. Colours are the style sheet's classes, so they follow light, dark and print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from markupsafe import Markup, escape

from exporter.report._data import Curve, Score
from exporter.report.waterfall import Step


@dataclass(frozen=True)
class Session:
    """One point of a history. day: as the axis shows it. said: everything about it. generation: of the bundle, from 0."""

    day: str
    ms: float
    low_ms: float
    high_ms: float
    generation: int
    said: str


SERIES = 6
"""Colours of the style sheet, s0 to s5; further series begin again, told apart by their mark."""

_SHAPES = ("circle", "square", "diamond", "triangle")


def _svg(width: float, height: float, label: str, body: Sequence[str], kind: str = "chart") -> Markup:
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(label)}">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _mark(x: float, y: float, shape: str, kind: str, size: float = 3.4) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" class="{kind}"/>'
    if shape == "square":
        return f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}" class="{kind}"/>'
    r = size * 1.35
    points = [(0, -r), (r, 0), (0, r), (-r, 0)] if shape == "diamond" else [(0, -r), (r, r * 0.8), (-r, r * 0.8)]
    drawn = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in points)
    return f'<polygon points="{drawn}" class="{kind}"/>'


def styles(curves: Sequence[Curve]) -> dict[str, tuple[str, str]]:
    """Method → (colour class, mark). Controls are grey, told apart by their mark."""
    given: dict[str, tuple[str, str]] = {}
    methods = controls = 0
    for curve in curves:
        if curve.control:
            given[curve.method] = ("control", _SHAPES[controls % 4])
            controls += 1
        else:
            given[curve.method] = (f"s{methods % SERIES}", _SHAPES[(methods + methods // SERIES) % 4])
            methods += 1
    return given


def key(colour: str, shape: str) -> Markup:
    """A legend's sample: a piece of line with its mark."""
    dash = " dashed" if colour == "control" else ""
    body = [_line(1, 7, 25, 7, f"series {colour}{dash}"), _mark(13, 7, shape, f"mark {colour}")]
    return _svg(26, 14, "", body, "key")


def accuracy_curves(curves: Sequence[Curve], kind: str, full: float | None, here: float) -> Markup:
    """Accuracy of one kind of question against the keep ratio (logarithmic); controls dashed; `here` is this run."""
    width, height, left, right, top, bottom = 330.0, 236.0, 36.0, 14.0, 14.0, 34.0
    ratios = sorted({p.keep_ratio for c in curves for p in c.points} | {here})
    low, high = log2(ratios[0]), log2(max(1.0, ratios[-1]))
    span = (high - low) or 1.0

    def x(ratio: float) -> float:
        return left + (log2(ratio) - low) / span * (width - left - right - 10) + 6

    def y(accuracy: float) -> float:
        return top + (1 - accuracy) * (height - top - bottom)

    body = [_line(x(here), top, x(here), height - bottom, "here")]
    for percent in (0, 25, 50, 75, 100):
        body += [
            _line(left, y(percent / 100), width - right, y(percent / 100), "grid" if percent else "axis"),
            _text(left - 7, y(percent / 100) + 3.5, f"{percent}", "tick", "end"),
        ]
    shown = 2 * width
    for ratio in sorted({p.keep_ratio for c in curves for p in c.points} | {1.0}, reverse=True):
        if shown - x(ratio) < 34:
            continue
        shown = x(ratio)
        body += [
            _line(shown, height - bottom, shown, height - bottom + 4, "axis"),
            _text(shown, height - bottom + 16, f"{100 * ratio:.3g} %", "tick", "middle"),
        ]
    if full is not None:
        body += [
            _line(left, y(full), width - right, y(full), "full"),
            _text(left + 4, y(full) - 5, f"unreduced {100 * full:.0f}", "tick full-label"),
        ]
    marks = styles(curves)
    for curve in sorted(curves, key=lambda c: not c.control):
        colour, shape = marks[curve.method]
        points = sorted((p.keep_ratio, p.accuracy[kind]) for p in curve.points if kind in p.accuracy)
        path = " ".join(f"{x(r):.1f},{y(a):.1f}" for r, a in points)
        dash = " dashed" if curve.control else ""
        body.append(f'<polyline points="{path}" class="series {colour}{dash}"/>')
        for ratio, accuracy in points:
            said = escape(f"{curve.method}: {100 * accuracy:.1f} % at {100 * ratio:.3g} % kept")
            body.append(f"<g>{_mark(x(ratio), y(accuracy), shape, f'mark {colour}')}<title>{said}</title></g>")
    return _svg(width, height, f"Accuracy on {kind} against the share of visual tokens kept", body)


def interval(score: Score, low: float, reference: float | None, kind: str) -> Markup:
    """A score as a dot with its 95 % interval, on an axis from `low` to 1; the tick is the unreduced score."""
    width, height, middle = 196.0, 16.0, 8.0

    def x(value: float) -> float:
        return 5 + (max(value, low) - low) / (1 - low) * (width - 10)

    first, last = score.interval
    body = [_line(x(low), middle, x(1), middle, "rail")]
    if reference is not None:
        body.append(_line(x(reference), 1, x(reference), height - 1, "reference"))
    body += [
        _line(x(first), middle, x(last), middle, f"range {kind}"),
        _mark(x(score.value), middle, "circle", f"mark {kind}", 3.6),
    ]
    said = f"{100 * score.value:.1f} %, 95 % interval {100 * first:.1f} to {100 * last:.1f} %"
    return _svg(width, height, said, body, "interval")


def span(step: Step, most_ms: float, colour: int) -> Markup:
    """One step of a waterfall in a row of its own, as wide as the page lets it be; a line between the tokens of a repeated one."""
    scale = 1000 / most_ms if most_ms else 0.0
    x, w, each = step.start_ms * scale, step.ms * scale, step.each_ms * scale
    kind = f"s{colour % SERIES}"
    body = [f'<rect x="{x:.2f}" width="{max(w, 2):.2f}" height="18" class="bar {kind}"/>']
    if each > 5:  # else the lines would be all there is
        body += [_line(x + i * each, 0, x + i * each, 18, "between") for i in range(1, step.times)]
    if step.start_ms:
        body.append(_line(x, -6, x, 0, "edge"))
    said = f"{step.stage}: from {step.start_ms:.3g} to {step.start_ms + step.ms:.3g} ms"
    return Markup(
        f'<svg class="span" viewBox="0 0 1000 18" preserveAspectRatio="none" role="img" aria-label="{escape(said)}">{"".join(body)}'
        f"<title>{escape(said)}</title></svg>"
    )


def tokens(before: int, after: int, most: int) -> Markup:
    """A bar for the tokens that come in, filled as far as they go on."""
    width, height = 420.0, 14.0
    inside, kept = before / most * width, after / most * width
    return _svg(
        width, height, f"{after} of {before} tokens",
        [f'<rect width="{inside:.1f}" height="{height:g}" rx="2" class="dropped"/>',
         f'<rect width="{max(kept, 2):.1f}" height="{height:g}" rx="2" class="bar s0"/>'],
        "chart wide",
    )  # fmt: skip


def history(stage: str, sessions: Sequence[Session]) -> Markup:
    """Milliseconds of one stage, session after session: the median and the range of its openings. A new bundle has a new colour,
    and a band in front of it."""
    width, height, left, right, top, bottom = 330.0, 200.0, 46.0, 12.0, 14.0, 34.0
    low = min(s.low_ms for s in sessions)
    high = max(s.high_ms for s in sessions)
    room = (high - low) * 0.08 or high * 0.05
    low, high = max(0.0, low - room), high + room
    step = (width - left - right) / max(1, len(sessions))

    def x(i: float) -> float:
        return left + (i + 0.5) * step

    def y(ms: float) -> float:
        return top + (high - ms) / (high - low) * (height - top - bottom)

    body = [_line(left, y(low), width - right, y(low), "axis")]
    for part in range(5):
        ms = low + (high - low) * part / 4
        if part:
            body.append(_line(left, y(ms), width - right, y(ms), "grid"))
        body.append(_text(left - 7, y(ms) + 3.5, f"{ms:.3g}", "tick", "end"))
    shown = -width
    for i, session in enumerate(sessions):
        colour = f"s{session.generation % SERIES}"
        if i and session.generation != sessions[i - 1].generation:
            body.append(_line(x(i - 0.5), top, x(i - 0.5), height - bottom, "here"))
        if x(i) - shown >= 62:
            shown = x(i)
            body.append(_text(shown, height - bottom + 16, session.day, "tick", "middle"))
        mark = _mark(x(i), y(session.ms), "circle", f"mark {colour}", min(3.4, max(1.2, step / 3)))
        spread = _line(x(i), y(session.low_ms), x(i), y(session.high_ms), f"range {colour}")
        body.append(f"<g>{spread}{mark}<title>{escape(session.said)}</title></g>")
    return _svg(width, height, f"{stage}, milliseconds over {len(sessions)} sessions", body)


@dataclass(frozen=True)
class Spot:
    """One candidate of a search. place: its row of the table. kind: method, control, unreduced or winner. said: all about it."""

    x: float
    percent: float
    place: int
    kind: str
    said: str


_SPOTS = {
    "method": ("s0", "circle"),
    "control": ("control", "square"),
    "unreduced": ("s1", "triangle"),
    "winner": ("s2", "diamond"),
}


def spots(found: Sequence[Spot], front: Sequence[Spot], axis: str, label: str, most: float | None = None) -> Markup:
    """Right answers against what they cost; every spot can be focused. front: is drawn as stairs. most: the budget on x."""
    width, height, left, right, top, bottom = 1000.0, 380.0, 46.0, 20.0, 16.0, 44.0
    xs, ys = [s.x for s in found], [s.percent for s in found]
    shown = most if most is not None and most <= 2 * max(xs) else None
    ends = [*xs, *([] if shown is None else [shown])]
    room = (max(ends) - min(ends)) * 0.05 or max(ends) * 0.05 or 1.0
    x_low, x_high = max(0.0, min(ends) - room), max(ends) + room
    y_low, y_high = max(0.0, 10 * (min(ys) // 10) - 4), 102.0

    def x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (width - left - right)

    def y(percent: float) -> float:
        return top + (y_high - percent) / (y_high - y_low) * (height - top - bottom)

    body = [_line(left, height - bottom, width - right, height - bottom, "axis")]
    for percent in range(0, 101, 10 if y_low >= 40 else 20):
        if percent >= y_low:
            body += [_line(left, y(percent), width - right, y(percent), "grid")]
            body += [_text(left - 7, y(percent) + 3.5, f"{percent}", "tick", "end")]
    for part in range(6):
        value = x_low + (x_high - x_low) * part / 5
        anchor = "start" if part == 0 else "end" if part == 5 else "middle"
        body.append(_text(x(value), height - bottom + 16, f"{value:.3g}", "tick", anchor))
    body.append(_text(width - right, height - 6, axis, "", "end"))
    if shown is not None:
        body += [
            _line(x(shown), top, x(shown), height - bottom, "full"),
            _text(x(shown) - 5, top + 10, "budget", "tick", "end"),
        ]
    stairs: list[str] = []
    for spot in sorted(front, key=lambda s: (s.x, s.percent)):
        if stairs:
            stairs.append(f"{x(spot.x):.1f},{stairs[-1].partition(',')[2]}")
        stairs.append(f"{x(spot.x):.1f},{y(spot.percent):.1f}")
    if stairs:
        body.append(f'<polyline points="{" ".join(stairs)}" class="series s2 dashed"/>')
    for spot in sorted(found, key=lambda s: (s.x, s.percent)):
        colour, shape = _SPOTS[spot.kind]
        said = escape(spot.said)
        mark = _mark(x(spot.x), y(spot.percent), shape, f"mark {colour}", 6.0 if spot.kind == "winner" else 4.6)
        body.append(
            f'<g class="spot" tabindex="0" role="img" data-place="{spot.place}" aria-label="{said}">{mark}<title>{said}</title></g>'
        )
    return Markup(
        f'<svg class="chart wide" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="group" '
        f'aria-label="{escape(label)}">{"".join(body)}</svg>'
    )
