"""`edgetrim run`: all stages, checkpoint → bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli import _options as options
from exporter.cli._output import Output

if TYPE_CHECKING:
    from exporter.job import Job


@click.command()
@options.job_options
@options.output_option()
@options.questions_option
@options.threads_option
@options.rounds_option
@options.json_option
def command(
    job: Job,
    output: Path,
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
    """
    from exporter import pipeline
    from exporter.cli import _results
    from exporter.cost.roofline import foresee
    from exporter.errors import GateError
    from exporter.stages._inputs import questions_for
    from exporter.workspace import Workspace

    out = Output(as_json)
    if (foreseen := foresee(job.plan())) is not None:  # refuse what does not fit before the folder is made
        foreseen.check()
    questions_for(job, questions, 1)
    gate: GateError | None = None
    with Workspace(output).locked() as work:
        try:
            pipeline.run(job, work, questions, per_kind, rounds, threads, out.stage, out.warn)
        except GateError as e:  # the bundle is whole; say what was found, then fail
            gate = e
        found = _results.summary(work)
    out.result(found.data, *found.parts)
    if gate is not None:
        raise gate
