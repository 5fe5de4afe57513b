"""A result made by hand, for the page."""

from __future__ import annotations

from pathlib import Path

from exporter.job import Job
from exporter.tune.budget import parse_all
from exporter.tune.candidates import Candidate, LeftOut
from exporter.tune.halving import Rung
from exporter.tune.measure import Asking
from exporter.tune.search import Entry, Result, Timed
from exporter.tune.wanted import Wanted

HOSTILE = "</script><script>alert('&\"')</script>"


def wanted(checkpoint: str = "embedded", budgets: tuple[str, ...] = ("latency=70",)) -> Wanted:
    job = Job(checkpoint, (), "cpu_fp32", frames=4, image_size=(56, 112))
    asking = Asking(Path("my questions.jsonl"), 10)
    return Wanted(job, ("cpu_fp32",), (), (0.5,), parse_all(budgets), 2, asking, 3, None)


def result() -> Result:
    def entry(spec: str, role: str, ms: float, right: int, engine: bool, out: str = "") -> Entry:
        candidate = Candidate((spec,) if spec else (), "cpu_fp32", role)  # type: ignore[arg-type]
        scores = (1.0,) * right + (0.0,) * (20 - right)
        return Entry(
            candidate, out, 2, 64, 32, ms / 10, 600 + ms, Timed(ms / 2, ms), Timed(ms, 2 * ms) if engine else None,
            scores, scores if engine else (), 100 - 5.0 * right, 4.0, "made up" if engine else "",
        )  # fmt: skip

    entries = (
        entry("", "unreduced", 50, 20, True),
        entry("visionzip:keep=32", "method", 30, 19, True),
        entry("fastv:layer=2,keep=32", "method", 20, 16, True),
        entry("tome:keep=32,position=keep", "method", 35, 8, False, "not among the 2 of rung 1 that went on"),
        entry("random:keep=32", "control", 29, 12, False),
    )
    left = (LeftOut("slowfast", "cpu_fp32", f"it needs {HOSTILE} at least 2 frames"),)
    rungs = {"cpu_fp32": (Rung(3, 20, 2),)}
    budgets = wanted().budgets
    return Result(entries, left, rungs, budgets, "measured", "latency", (0, 1, 2), 1, (f"A warning, {HOSTILE}",))
