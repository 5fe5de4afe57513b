"""What a search asks of a model: what a candidate costs, how many answers are right, and, of finalists, how fast they are.

Functions of one task that return JSON, so that they run in this process and on other machines alike. What does not fit is no error
here: it comes back as `Refused`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache, wraps
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from exporter import pipeline
from exporter.cost import roofline
from exporter.engines import open_runners, runnable_engines
from exporter.errors import EnvironmentMismatch, ExportError
from exporter.job import Job
from exporter.stages._inputs import questions_for, synthetic
from exporter.tune.found import Cost, Finished, Refused, Timings
from exporter.workspace import Workspace
from graphs._contract import ReductionError

if TYPE_CHECKING:
    from exporter.stages._task import Question

NEW_TOKENS = 16
"""Tokens per timed round; a whole answer is reckoned from the time per token."""


@dataclass(frozen=True)
class Asking:
    """Which questions: the user's file, or so many of each kind of the embedded set; the order they are asked in is drawn."""

    path: Path | None
    per_kind: int
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """A candidate's job and what of it is wanted: the questions from `start` to `stop`; folder: where it is exported to."""

    job: Job
    asking: Asking
    start: int = 0
    stop: int = 0
    folder: Path | None = None
    threads: int | None = None


def left_out(function: Callable[[Task], Any]) -> Callable[[Task], Any]:
    """EdgeTrim's own errors as a result."""

    @wraps(function)
    def called(task: Task) -> Any:
        try:
            return function(task)
        except (ExportError, ReductionError) as e:
            return asdict(Refused(str(e)))

    return called


@lru_cache(2)
def _questions(checkpoint: str, frames: int, asking: Asking) -> tuple[Question, ...]:
    found = questions_for(Job(checkpoint, (), "cpu_fp32", frames), asking.path, asking.per_kind)
    Random(asking.seed).shuffle(found)
    return tuple(found)


def questions(job: Job, asking: Asking) -> tuple[Question, ...]:
    """In the order they are asked: any first part is a sample of all. Raises UsageError."""
    return _questions(job.checkpoint, job.frames, asking)


@left_out
def cost(task: Task) -> dict[str, Any]:
    """A `Cost`."""
    plan = task.job.plan()
    found = roofline.estimate(plan, plan.profile)
    found_out = Cost(
        tokens=plan.geometry.tower.total,
        kept=min([step.after for step in plan.steps], default=plan.kept),
        memory_mib=found.need_bytes / 2**20,
        gflop=sum(stage.flops for stage in found.stages if stage.name in roofline.FIRST) / 1e9,
        ttft_ms=found.first_token_ms,
        latency_ms=found.answer_ms,
        refused=" ".join(found.refusals),
    )
    return asdict(found_out)


@left_out
def ask(task: Task) -> list[float]:
    """Scores, 0..1, of the questions wanted, by the PyTorch reference, which knows no precision."""
    from exporter.stages import validate
    from exporter.stages._processor import prompt_of

    _limit(task.threads)
    plan = task.job.plan()
    wanted = questions(task.job, task.asking)[task.start : task.stop]
    told = validate.ask_reference(plan, prompt_of(plan), wanted)
    return [question.score(answer) for answer, question in zip(told, wanted, strict=True)]


@left_out
def finish(task: Task) -> dict[str, Any]:
    """Export, build where this machine can, and ask the engines, or ONNX Runtime on their graphs, all questions: a `Finished`."""
    from exporter.runtime.generate import Generator
    from exporter.runtime.prompt import Prompt
    from exporter.stages import validate

    assert task.folder is not None
    _limit(task.threads)
    with Workspace(task.folder).locked() as work:
        _exported(task.job, work)
        profile = task.job.loaded_profile()
        wanted = questions(task.job, task.asking)[: task.stop]
        with open_runners(work.folder, profile, task.threads) as (runners, graphs, table, where):
            prompt, batch = Prompt.of(work.graphs, graphs), min(validate.BATCH, profile.limits.batch)
            told = validate.answers(Generator(runners, graphs, table), prompt, wanted, batch=batch)
        scores = tuple(question.score(answer) for answer, question in zip(told, wanted, strict=True))
        return asdict(Finished(scores, where, _own(work)))


def _exported(job: Job, work: Workspace) -> None:
    if not pipeline.exported(work, job):
        pipeline.run_export(job, work)
    pipeline.check_graphs(work)
    if not (work.engines / "engines.json").is_file():
        try:
            pipeline.run_build(work)
        except EnvironmentMismatch:
            if _refused(work):
                raise


def _refused(work: Workspace) -> bool:
    """Whether it does not fit the device, other than not to be built here."""
    try:
        pipeline.refuse_what_does_not_fit(work)
    except EnvironmentMismatch:
        return True
    return False


def _own(work: Workspace) -> bool:
    """Whether what runs here is the profile's own runtime."""
    from exporter.graphset import GraphSet
    from exporter.stages.build import backend_for

    profile = Job.read(work).loaded_profile()
    graphs = GraphSet.load(work.graphs)
    return backend_for(profile).runs_graphs or bool(runnable_engines(work.folder, graphs, profile))


def times(tasks: Sequence[Task], rounds: int) -> list[dict[str, float]]:
    """Of finished candidates, all opened in this process and timed in turn: `Timings`."""
    import numpy as np

    from exporter.stages import bench

    with ExitStack() as stack:
        variants, side = list[bench.Variant](), dict[str, Any]()
        for number, task in enumerate(tasks):
            assert task.folder is not None
            work = Workspace(task.folder)
            _exported(task.job, stack.enter_context(work.locked()))
            opened = open_runners(work.folder, task.job.loaded_profile(), task.threads)
            runners, graphs, table, _ = stack.enter_context(opened)
            pixels, prompts, sides = synthetic(work, graphs, 1)
            side |= sides[0]
            variants.append(bench.Variant(str(number), runners, graphs, table))
        found = bench.timings(bench.sample(variants, np.asarray(pixels[0]), prompts, NEW_TOKENS, rounds, side=side))
    medians = ({stage: found[v.name][stage].median_ms for stage in ("ttft", "decode")} for v in variants)
    return [asdict(Timings(**each)) for each in medians]


def _limit(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
