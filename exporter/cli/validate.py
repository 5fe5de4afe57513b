"""`edgetrim validate`: is it the same mathematics, and does it still answer right?"""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli import _ci
from exporter.cli import _options as options
from exporter.cli._output import Output


@click.command()
@options.folder_argument
@options.questions_option
@click.option(
    "--reference", type=click.Choice(("pytorch", "recorded")), default=None,
    help="PyTorch, or what it gave where the model was exported. Default: PyTorch if it and the checkpoint are here.",
)  # fmt: skip
@options.threads_option
@_ci.ci_options
@options.json_option
def command(
    folder: Path,
    questions: Path | None,
    per_kind: int,
    reference: str | None,
    threads: int | None,
    junit: Path | None,
    annotations: str | None,
    as_json: bool,
) -> None:
    """Compare FOLDER with PyTorch, and ask it questions.

    Fidelity compares every stage on the same input. Quality compares task scores: unreduced, reduced, the engine, and
    random and uniform selection of as many tokens. Exit code 3 if a gate of the profile does not pass; the evidence is
    written first. After a kill the same command asks only what is not answered yet. On a device, without PyTorch or the checkpoint,
    fidelity alone is compared, with outputs that the bundle holds.
    """
    from exporter import pipeline
    from exporter.cli import _gates, _results
    from exporter.errors import GateError, UsageError
    from exporter.graphset import GraphSet
    from exporter.job import Job
    from exporter.workspace import Workspace

    out = Output(as_json)
    gate: GateError | None = None
    with Workspace(folder).locked() as work:
        job = Job.read(work)
        recorded = reference == "recorded" or (reference is None and pipeline.why_recorded(job) is not None)
        if recorded and questions is not None:
            raise UsageError(
                "--questions needs PyTorch and the checkpoint, which answer them too. Ask them where the model was exported, or leave them out."
            )
        with out.stage("validate") as log:
            try:
                if recorded:
                    pipeline.run_validate_recorded(work, threads, log)
                else:
                    pipeline.run_validate(work, questions, per_kind, threads, log)
            except GateError as e:
                gate = e
        record = work.read_json("evidence/validation.json", "Run `edgetrim validate` again.")
        headline = _results.headline(job, GraphSet.load(work.graphs))
    out.result({"folder": folder, **record}, headline, *_results.validation(record))
    _ci.tell(out, job.loaded_profile().name, _gates.accuracy_cases(record), junit, annotations)
    if gate is not None:
        raise gate
