"""What stages are tried on: the user's questions, the embedded model's, or images and prompts made up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.graphset import GraphSet
from exporter.job import EMBEDDED, Job
from exporter.workspace import Workspace

if TYPE_CHECKING:
    from exporter.plan import Plan
    from exporter.stages._task import Question


def questions_for(job: Job, path: Path | None, per_kind: int) -> list[Question]:
    """The user's questions, or the embedded set for the embedded model; none for any other model."""
    from exporter.stages import _task

    if path is not None:
        return _task.from_file(path, job.frames)
    return _task.embedded(job.frames, per_kind) if job.checkpoint == EMBEDDED else []


def calibration_for(job: Job, plan: Plan) -> list[Question]:
    """Whose activations are looked at: the user's questions, or embedded ones on digits that no evaluation asks about; none
    where nobody looks."""
    from exporter.stages import _calibrate, _task

    if not _calibrate.wanted(plan) and plan.profile.precision.islands == "none":
        return []
    if job.calibration is not None:
        return _task.from_file(Path(job.calibration), job.frames)
    return _task.for_calibration(job.frames)


def synthetic(
    work: Workspace, graphs: GraphSet, count: int = 3
) -> tuple[list[Any], list[list[int]], list[dict[str, Any]]]:
    """Smooth random images, random prompts, and what else `reduce` takes, for models without questions. Seeded."""
    from exporter.runtime import question

    rng = np.random.default_rng(0)
    image, frames = graphs.image, graphs.visual.frames
    pixels, prompts = [], []
    words = [
        t for t in range(min(graphs.text.vocab, 1000)) if t != graphs.text.image_token and t not in graphs.text.eos
    ]
    for _ in range(count):
        coarse = rng.normal(size=(1, frames, 3, 8, 8))
        rows, cols = -(-image.height // 8), -(-image.width // 8)
        pixels.append(np.kron(coarse, np.ones((rows, cols)))[..., : image.height, : image.width].astype(np.float32))
        ids = rng.choice(words, 12).tolist()
        prompts.append([*ids[:2], *[graphs.text.image_token] * graphs.visual.placeholders, *ids[2:]])
    sides: list[dict[str, Any]] = [{} for _ in range(count)]
    for reader in question.readers(work.graphs / "processor"):
        for n, side in enumerate(sides, 1):
            side.update(reader.side([f"What is in image {n}?"]))
    return pixels, prompts, sides
