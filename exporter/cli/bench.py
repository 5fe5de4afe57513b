"""`edgetrim bench`: latency per stage, with and without reduction."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli import _options as options
from exporter.cli._output import Output


@click.command()
@options.folder_argument
@options.rounds_option
@click.option(
    "--new-tokens", type=click.IntRange(2), default=16, show_default=True, metavar="N", help="Tokens generated a round."
)
@click.option(
    "--compare/--no-compare",
    default=True,
    show_default=True,
    help="Also time PyTorch, and the unreduced model in both runtimes.",
)
@options.threads_option
@options.json_option
def command(folder: Path, rounds: int, new_tokens: int, compare: bool, threads: int | None, as_json: bool) -> None:
    """Time every stage of FOLDER: vision, reduction, prefill, decode.

    All variants run in one process, in turn, so that what disturbs the machine disturbs all alike.
    """
    from exporter import pipeline
    from exporter.cli import _results
    from exporter.graphset import GraphSet
    from exporter.workspace import Workspace

    out = Output(as_json)
    with Workspace(folder).locked() as work:
        job = pipeline.Job.read(work)
        with out.stage("bench") as log:
            record = pipeline.run_bench(work, rounds, new_tokens, threads, compare, log)
        headline = _results.headline(job, GraphSet.load(work.graphs))
    out.result({"folder": folder, **record}, headline, *_results.latency(record))
