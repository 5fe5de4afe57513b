"""The demo: the embedded model end to end. Two bundles that run here, and engines for RTX GPUs that are only built here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporter import pipeline
from exporter.errors import EnvironmentMismatch, GateError
from exporter.graphset import GraphSet
from exporter.job import EMBEDDED, Job
from exporter.workspace import Workspace

Stage = Callable[[str], AbstractContextManager[Callable[[str], None]]]
RATIOS = (0.125, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Part:
    """One bundle. `curves`: spec templates, see `stages.curves.fill`. `engines`: profiles to build engines for besides."""

    name: str
    job: Job
    curves: tuple[str, ...]
    engines: tuple[str, ...] = ()


IMAGE = Part(
    "image",
    # Without CLS and with the tokens' own positions: the language model was trained on patches where they stand.
    Job(EMBEDDED, ("visionzip:keep=32,cls=off,position=keep",), "cpu_int4"),
    (
        "fastv:keep={total}",
        "visionzip:keep={keep},cls=off,position=keep",
        "visionzip:keep={keep}",
        "tome:keep={keep},position=keep",
        "random:keep={keep}",
        "uniform:keep={keep}",
    ),
    ("rtx_fp16", "rtx_int4"),
)
CLIP = Part(
    "clip",
    # Two of four frames stay where little changes; then, inside the language model, a quarter of all tokens.
    Job(EMBEDDED, ("lftr:temporal=differential,keep_frames=2", "fastv:layer=3,keep=64"), "cpu_int4", frames=4),
    (
        "lftr:temporal=differential,keep_frames={frames}",
        "lftr:spatial=topic,keep={keep},position=keep",
        "lftr:temporal=differential,keep_frames=2 + fastv:layer=3,keep={total}",
        "visionzip:keep={keep},cls=off,position=keep",
        "random:keep={keep}",
        "uniform:keep={keep}",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What the demo made. `left_out`: what this machine lacks for the rest, in words; `failed`: gates, in words."""

    bundles: list[Path]
    engines: list[Path]
    left_out: list[str]
    failed: list[str]


def run(
    output: Path,
    stage: Stage,
    per_kind: int = 200,
    curve_questions: int = 60,
    rounds: int = 9,
    threads: int = 1,
) -> Outcome:
    """Make everything below `output`, anew.

    Args:
        per_kind: questions of each kind for the quality tables. curve_questions: for every point of the curves.
    """
    outcome = Outcome([], [], [], [])
    import torch

    torch.set_num_threads(threads)
    for part in (IMAGE, CLIP):
        with Workspace(output / part.name).locked() as work:
            _graphs(part, work, stage)
            _evidence(part, work, stage, per_kind, curve_questions, rounds, threads, outcome)
            _other_engines(part, work, output, stage, outcome)
            with stage(f"{part.name}: pack"):
                pipeline.run_pack(work)
            outcome.bundles.append(work.folder)
    return outcome


def _graphs(part: Part, work: Workspace, stage: Stage) -> None:
    with stage(f"{part.name}: export {' + '.join(part.job.reductions)}") as log:
        pipeline.run_export(part.job, work, log)
    with stage(f"{part.name}: build for {part.job.profile}") as log:
        pipeline.run_build(work, log)


def _evidence(
    part: Part, work: Workspace, stage: Stage, per_kind: int, curve_questions: int, rounds: int, threads: int,
    outcome: Outcome,
) -> None:  # fmt: skip
    from exporter.stages import _task, curves

    with stage(f"{part.name}: validate") as log:
        try:
            pipeline.run_validate(work, None, per_kind, threads, log)
        except GateError as e:
            outcome.failed.append(f"{part.name}: {e}")
    with stage(f"{part.name}: bench") as log:
        pipeline.run_bench(work, rounds, threads=threads, log=log)
    reference = replace(part.job, profile="cpu_fp32")
    with stage(f"{part.name}: accuracy against tokens kept") as log:
        curves.write(work, curves.measure(reference, part.curves, RATIOS, curve_questions, log))
    with stage(f"{part.name}: draw what is kept"):
        question = _task.embedded(part.job.frames, 1)[0]
        own = " + ".join(part.job.reductions)
        site = part.job.plan().geometry.tower
        others = [curves.fill(template, 0.5, site.tokens, site.frames) for template in part.curves]
        specs = list(dict.fromkeys([own, *(spec for spec in others if spec)]))
        curves.write_overlays(work, curves.overlays(reference, specs, question), question.question)


def _other_engines(part: Part, work: Workspace, output: Path, stage: Stage, outcome: Outcome) -> None:
    """Engines for other targets, each in a folder of its own; the part's report lists them."""
    from exporter.stages import report
    from exporter.stages.build import why_not_here

    entries: list[dict[str, Any]] = []
    for profile in part.engines:
        job = replace(part.job, profile=profile)
        if reason := why_not_here(job.loaded_profile()):
            outcome.left_out.append(f"engines for {profile}: {reason}")
            continue
        with Workspace(output / profile).locked() as other:
            try:
                with stage(f"{profile}: export and build engines") as log:
                    pipeline.run_export(job, other, log)
                    pipeline.run_build(other, log)
            except EnvironmentMismatch as e:
                outcome.left_out.append(f"engines for {profile}: {e}")
                continue
            with stage(f"{profile}: pack"):
                pipeline.run_pack(other)
            entries += report.engine_entries(other, GraphSet.load(other.graphs), job.loaded_profile())
            outcome.engines.append(other.folder)
    if entries:
        work.write(report.OTHER_ENGINES, json.dumps(entries, indent=1) + "\n")


def other_entries(work: Workspace) -> Sequence[dict[str, Any]]:
    """Engines for other targets that the part's report lists."""
    from exporter.stages import report

    found: Sequence[dict[str, Any]] = report.optional(work, report.OTHER_ENGINES) or []
    return found
