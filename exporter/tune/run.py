"""A search from what the user asked for: candidates, journal and tools put together, results written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from exporter import __version__
from exporter.cost.roofline import Use
from exporter.errors import UsageError
from exporter.job import folder_of
from exporter.report import tune as page
from exporter.tune import measure, report
from exporter.tune.candidates import Candidate, candidates, templates
from exporter.tune.journal import Journal
from exporter.tune.search import Result, Search, Tools
from exporter.tune.wanted import Wanted
from exporter.tune.workers import Workers
from exporter.workspace import Workspace

JOURNAL = "tune.jsonl"
FINALISTS = ".part-finalists"
"""Their exports, while the search goes on."""
SHOWN = 5
"""Reasons of an error."""


def check(wanted: Wanted) -> None:
    """What can be wrong before a folder is made. Raises UsageError, CheckpointError."""
    templates(wanted.methods)
    wanted.job.plan()
    if not measure.questions(wanted.job, wanted.asking):
        raise UsageError(
            "There are no labelled questions for this checkpoint and this number of frames, so quality cannot be measured. "
            "Pass --questions FILE.jsonl."
        )


def run(wanted: Wanted, work: Workspace, workers: Workers, log: Callable[[str], None]) -> Result:
    """The search, in a locked folder: tune.jsonl, tune.html after every rung, winner.json at the end.

    Raises:
        UsageError: the folder is another search's. Else what the stages raise.
    """
    log("what fits")
    found, left = candidates(wanted.job, wanted.methods, wanted.keep, wanted.profiles, log)
    if not any(c.role == "method" for c in found):
        reasons = "\n".join(f"  {entry.spec}: {entry.reason}" for entry in left[:SHOWN])
        raise UsageError(f"No method that was asked for fits:\n{reasons}")
    questions = measure.questions(wanted.job, wanted.asking)
    journal = Journal(work.folder / JOURNAL, _made_from(wanted, found))
    (work.folder / report.WINNER).unlink(missing_ok=True)

    def write(result: Result) -> None:
        work.write(report.PAGE, page.render(result, wanted))

    uses = {p: Use.within(replace(wanted.job, profile=p).loaded_profile().limits) for p in wanted.profiles}
    search = Search(
        found, left, wanted.budgets, len(questions), wanted.finalists, {p: use.new_tokens for p, use in uses.items()},
        _tools(wanted, work, workers, len(questions)), journal, log, write,
    )  # fmt: skip
    result = search.run()
    if result.winner is not None:
        work.write(report.WINNER, json.dumps(report.winner(result, wanted), indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(work.folder / FINALISTS, ignore_errors=True)
    return result


def _tools(wanted: Wanted, work: Workspace, workers: Workers, questions: int) -> Tools:
    def task(c: Candidate, start: int = 0, stop: int = 0) -> measure.Task:
        job = replace(wanted.job, reductions=c.reductions, profile=c.profile)
        folder = (work.folder / FINALISTS / hashlib.sha256(c.key.encode()).hexdigest()[:16]).resolve()
        return measure.Task(job, wanted.asking, start, stop, folder, wanted.threads)

    def ask(asked: Sequence[Candidate], start: int, stop: int) -> Iterable[tuple[int, Any]]:
        return workers(measure.ask, [task(c, start, stop) for c in asked])

    return Tools(
        cost=lambda asked: workers(measure.cost, [task(c) for c in asked]),
        ask=ask,
        finish=lambda asked: workers(measure.finish, [task(c, 0, questions) for c in asked]),
        times=lambda asked: measure.times([task(c) for c in asked], wanted.rounds),
    )


def _made_from(wanted: Wanted, found: Sequence[Candidate]) -> dict[str, Any]:
    """What the journal's values depend on. Budgets are not among it: another budget asks the same questions of the same model, only
    of others."""
    from exporter.stages._answers import stamps

    job = wanted.job
    folders = [folder_of(job.checkpoint), *([] if job.clip is None else [folder_of(job.clip)])]
    asked = measure.questions(job, wanted.asking)
    files = [Path(p) for p in (job.calibration,) if p is not None]
    return {
        "EdgeTrim": __version__,
        "checkpoint": _digest([stamps(folder) for folder in folders]),
        "profiles": {p: _digest(asdict(replace(job, profile=p).loaded_profile())) for p in wanted.profiles},
        "candidates": _digest([c.key for c in found]),
        "questions": _digest([(q.key, q.answer, q.also, q.metric) for q in asked]),
        "input": [
            job.frames,
            job.image_size,
            job.quantizer,
            [hashlib.sha256(f.read_bytes()).hexdigest() for f in files],
        ],
        "timing": [wanted.rounds, wanted.threads],
    }


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]
