"""`edgetrim calibrate`: what a method has to know of a model before it is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from exporter import _discover, calibrators
from exporter.cli import _options as options
from exporter.cli._output import Output, table

NAMES = _discover.names(calibrators)


class CalibratorType(click.ParamType[str]):
    """A calibrator with its knobs, left as text; completes the name."""

    name = "method"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(n) for n in NAMES if n.startswith(incomplete)]


@click.command()
@click.argument("method", type=CalibratorType(), metavar=f"{'|'.join(NAMES)}[:knob=value,…]")
@options.checkpoint_argument(required=False)
@click.option(
    "--questions", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.jsonl",
    help="Questions with answers, as `validate` takes them; sparsemm needs a box for each. Default, for the embedded model only: "
    "its own task, on digits that training has seen.",
)  # fmt: skip
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), metavar="FILE",
    help="Where the method's file goes, if it has one. Default: called like the method, here.",
)  # fmt: skip
@options.frames_option
@options.image_size_option
@options.clip_model_option
@options.json_option
def command(
    method: str,
    checkpoint: str,
    questions: Path | None,
    output: Path | None,
    frames: int,
    image_size: tuple[int, int] | None,
    clip: str | None,
    as_json: bool,
) -> None:
    """Measure what a method has to know of CHECKPOINT, by PyTorch, and print the spec for --reduce.

    A method's own knobs are written like a reduction's: vtw:threshold=0.001. A file that it writes is named in the spec as --output
    names it. An existing file is replaced when the new one is whole.
    """
    from exporter.calibrators import _contract
    from exporter.job import Job

    out = Output(as_json)
    job = Job(checkpoint, (), "cpu_fp32", frames, image_size, clip)
    with out.stage("calibrate") as log:
        found, file = _contract.run(method, job, questions, output, log)
    shown = found.table
    data = {"method": method, "specs": list(found.specs.values()), "file": file, **found.found}
    specs = [f"--reduce {spec}" + (f"  ({called})" if called else "") for called, spec in found.specs.items()]
    out.result(data, table(shown.title, shown.columns, shown.rows), shown.note, *specs)
