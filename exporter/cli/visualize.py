"""`edgetrim visualize`: which tokens are kept, drawn on the image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli import _options as options
from exporter.cli._output import Output, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exporter.stages._task import Question
    from exporter.stages.curves import Picture

QUESTION = "What is in this image?"


@click.command()
@click.argument("source", metavar="CHECKPOINT|FOLDER", default="embedded")
@options.images_options
@options.reduce_option
@options.frames_option
@options.image_size_option
@options.clip_model_option
@click.option(
    "--question",
    metavar="TEXT",
    help="For reductions that look at the prompt. Default: the sample's, or a general one.",
)
@options.output_option("visualized")
@options.json_option
def command(
    source: str,
    images: tuple[Path, ...],
    clips: tuple[Path, ...],
    reductions: tuple[str, ...],
    frames: int,
    image_size: tuple[int, int] | None,
    clip: str | None,
    question: str | None,
    output: Path,
    as_json: bool,
) -> None:
    """Draw which tokens are kept: bright what stays, dim what goes.

    For a CHECKPOINT, one picture per --reduce, by PyTorch; "visionzip:keep=48 + fastv:keep=16" composes two. For an output
    FOLDER, the reductions in its graphs, by ONNX Runtime. A merged token is drawn where its anchor stands. Without an image,
    the embedded model gets a held-out question of its own.
    """
    out = Output(as_json)
    folder = Path(source)
    with out.stage("visualize") as log:
        if (folder / "graphs" / "graphs.json").is_file():
            pictures = _of_folder(folder, images, clips, reductions, clip, question)
        else:
            pictures = _of_checkpoint(source, images, clips, reductions, frames, image_size, clip, question, log)
        files = _save(pictures, output)
    rows = [(p.method, f"{p.image.width} × {p.image.height}", file) for p, file in zip(pictures, files, strict=True)]
    data = [
        {"method": p.method, "file": file, "before": p.total, "index": p.index}
        for p, file in zip(pictures, files, strict=True)
    ]
    out.result(data, table("Kept tokens", ("reduction", "size", "file"), rows))


def _of_folder(
    folder: Path,
    images: Sequence[Path],
    clips: Sequence[Path],
    reductions: Sequence[str],
    clip: str | None,
    question: str | None,
) -> list[Picture]:
    from exporter.bundle import MANIFEST, Bundle
    from exporter.engines import open_runners
    from exporter.errors import UsageError
    from exporter.job import Job
    from exporter.runtime.generate import Generator
    from exporter.runtime.images import preprocess
    from exporter.runtime.prompt import Prompt
    from exporter.stages import curves
    from exporter.workspace import Workspace

    if reductions or clip:
        option = "--reduce" if reductions else "--clip-model"
        raise UsageError(f"{option} is for checkpoints: {folder} has its reductions in its graphs.")
    if (folder / MANIFEST).is_file():
        Bundle.open(folder)
    job = Job.read(Workspace(folder))
    with open_runners(folder, job.loaded_profile()) as (runners, graphs, embedding, _):
        asked = _question(job.checkpoint, images, clips, graphs.images, question)
        prompt = Prompt.of(folder / "graphs", graphs)
        ids = prompt.ask(asked.question, graphs.visual.placeholders, graphs.visual.media)
        name = " + ".join(job.reductions) or "all tokens"
        pixels, side = preprocess(asked.frames, graphs.image), prompt.side([asked.question])
        return [curves.picture(Generator(runners, graphs, embedding), pixels, ids, name, side)]


def _of_checkpoint(
    checkpoint: str,
    images: Sequence[Path],
    clips: Sequence[Path],
    reductions: Sequence[str],
    frames: int,
    image_size: tuple[int, int] | None,
    clip: str | None,
    question: str | None,
    log: object,
) -> list[Picture]:
    from exporter.errors import UsageError
    from exporter.job import Job
    from exporter.stages import curves

    if not reductions:
        raise UsageError("Which reduction? Give --reduce, for instance --reduce uniform:keep_ratio=0.25.")
    job = Job(checkpoint, (), "cpu_fp32", frames, image_size, clip)
    job.plan()
    return curves.overlays(job, reductions, _question(checkpoint, images, clips, frames, question))


def _question(
    checkpoint: str, images: Sequence[Path], clips: Sequence[Path], frames: int, question: str | None
) -> Question:
    from dataclasses import replace

    from exporter.cli import _samples
    from exporter.stages._task import Question

    if given := _samples.frames(images, clips, frames):
        return Question("custom", given, question or QUESTION, "")
    sample = _samples.sample(checkpoint, frames)
    return replace(sample, question=question) if question else sample


def _save(pictures: Sequence[Picture], output: Path) -> list[Path]:
    """One PNG each, named after the reduction."""
    from exporter.errors import UsageError
    from exporter.report import overlay
    from exporter.workspace import write_bytes

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"Cannot write to {output}: {e.strerror}. Choose another --output.") from e
    files: list[Path] = []
    for drawn in pictures:
        name = re.sub(r"[^A-Za-z0-9.]+", "-", drawn.method).strip("-")[:200]
        path = output / f"{name}.png"
        write_bytes(path, overlay.png(drawn.image))
        files.append(path)
    return files
