"""`edgetrim demo`: the embedded model end to end, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli import _options as options
from exporter.cli._output import Output


@click.command()
@options.output_option("demo")
@click.option(
    "--per-kind", type=click.IntRange(1), default=200, show_default=True, metavar="N", help="Questions of each kind."
)
@click.option(
    "--curve-questions",
    type=click.IntRange(1),
    default=60,
    show_default=True,
    metavar="N",
    help="Questions of each kind for every point of the curves.",
)
@options.rounds_option
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    metavar="N",
    help="CPU threads of both runtimes. The model is too small to gain from more.",
)
@options.json_option
def command(output: Path, per_kind: int, curve_questions: int, rounds: int, threads: int, as_json: bool) -> None:
    """Take the embedded model through every stage, and write a report.

    Two bundles that run on this machine's CPU (an image model and one for clips), with accuracy against tokens kept, method
    by method; and TensorRT-RTX engines of the image model, built here and not run, where TensorRT-RTX is installed.
    """
    from exporter import demo
    from exporter.cli import _results
    from exporter.errors import GateError
    from exporter.workspace import Workspace

    out = Output(as_json)
    outcome = demo.run(output, out.stage, per_kind, curve_questions, rounds, threads)
    data: dict[str, Any] = {"bundles": [], "engines": outcome.engines, "left_out": outcome.left_out}
    parts: list[Any] = []
    for folder in outcome.bundles:
        work = Workspace(folder)
        found = _results.summary(work)
        parts += [f"━━ {folder}", *found.parts]
        if others := demo.other_entries(work):
            table = _results.engine_table(list(others), "Engines for other targets, built here, not run here")
            found.data["other_engines"] = table.data["engines"]
            parts += table.parts
        data["bundles"].append(found.data)
        parts.append("")
    for words in outcome.left_out:
        out.warn(f"Left out: {words}")
    parts.append(f'Try: edgetrim chat {outcome.bundles[0]} "How many sevens are there?"')
    out.result(data, *parts)
    if outcome.failed:
        raise GateError(" ".join(outcome.failed))
