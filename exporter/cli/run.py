"""`edgetrim run`: all stages, checkpoint → bundle; or those that a folder of graphs still lacks."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from exporter.cli import _options as options
from exporter.cli._output import Output

if TYPE_CHECKING:
    from exporter.job import Job


@click.command()
@options.job_options
@click.option(
    "--output", "-o", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
    help="Folder to write to. Required, but for a folder that `export`, `run` or `pack` made.",
)  # fmt: skip
@options.questions_option
@options.threads_option
@options.rounds_option
@options.json_option
@click.pass_context
def command(
    context: click.Context,
    job: Job,
    output: Path | None,
    questions: Path | None,
    per_kind: int,
    threads: int | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Export, build, validate, bench and pack.

    CHECKPOINT is a folder in Hugging Face layout, a hub id, or `embedded` (the default). Graphs and engines that are in
    the folder already, for the same arguments, are kept. Engines that only the device can build are left to it; the
    graphs are then checked by ONNX Runtime.

    On the device CHECKPOINT is the bundle: its engines are built there if it has none, compared with what it recorded, timed,
    and packed. That needs neither PyTorch nor the checkpoint. Exit code 5 where they cannot be built.
    """
    from exporter import pipeline
    from exporter.cli import _results
    from exporter.errors import GateError
    from exporter.job import JOB
    from exporter.workspace import Workspace

    out = Output(as_json)
    there = Path(job.checkpoint)
    if (there / JOB).is_file():
        _refuse_what_it_says_itself(context, there)
        folder, stages = there, pipeline.finish
    else:
        folder, stages = _output_for(context, job, questions, output), partial(pipeline.run, job)
    gate: GateError | None = None
    with Workspace(folder).locked() as work:
        try:
            stages(work, questions, per_kind, rounds, threads, out.stage, out.warn)
        except GateError as e:  # the bundle is whole; say what was found, then fail
            gate = e
        found = _results.summary(work)
    out.result(found.data, *found.parts)
    if gate is not None:
        raise gate


def _refuse_what_it_says_itself(context: click.Context, folder: Path) -> None:
    """Options that say what is to be made, beside a folder in which it is made. Raises UsageError."""
    from exporter.errors import UsageError
    from exporter.job import Job

    says = {"output", "reductions", *(field.name for field in fields(Job))} - {"checkpoint"}
    given = [
        param.opts[0]
        for param in context.command.params
        if param.name in says and context.get_parameter_source(param.name) is not ParameterSource.DEFAULT
    ]
    if given:
        raise UsageError(
            f"{folder} is exported already, and says itself what it is of: leave out {', '.join(given)}, or name the checkpoint to export it anew."
        )


def _output_for(context: click.Context, job: Job, questions: Path | None, output: Path | None) -> Path:
    """Where to. Refuses, before the folder is made, what cannot be run."""
    from exporter.cost.roofline import foresee
    from exporter.stages._inputs import questions_for

    if output is None:
        raise click.MissingParameter(ctx=context, param=next(p for p in context.command.params if p.name == "output"))
    if (foreseen := foresee(job.plan())) is not None:
        foreseen.check()
    questions_for(job, questions, 1)
    return output
