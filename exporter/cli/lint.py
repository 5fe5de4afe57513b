"""`edgetrim lint`: what a target would refuse or get wrong in a graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli import _options as options
from exporter.cli._output import Output

if TYPE_CHECKING:
    from profiles._schema import Stack


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="FOLDER|GRAPH.onnx")
@options.profile_option(default=None)
@options.json_option
def command(path: Path, profile: str | None, as_json: bool) -> None:
    """Name every node that a profile's TensorRT would refuse, miscompile or run slowly.

    No GPU and no TensorRT is needed: what each version takes is in tables, with their sources. PATH is an ONNX file, yours too, or a
    bundle or output folder, whose own profile is the default. Weights are not read. Exit code 5 where a node is rejected or
    miscompiled.
    """
    from exporter.errors import EnvironmentMismatch, UsageError
    from exporter.lint._check import in_words, lint
    from exporter.lint._table import table_for
    from profiles import _schema

    out = Output(as_json)
    chosen = profile or _own_profile(path)
    if chosen is None:
        raise UsageError(f"Which target is {path} for? Pass --profile; `edgetrim list profiles` shows them.")
    target = _schema.load(chosen)
    files = _graphs(path, target.stack)
    table = table_for(target.stack)
    if table is None:
        raise UsageError(
            f'Profile `{target.name}` runs on backend "{target.stack.backend}", which says itself what it takes when it opens a '
            "graph. Pass a profile for TensorRT, such as --profile orin_nano_8gb_int4."
        )
    with out.stage("lint"):
        findings = [finding for file in files for finding in lint(file, table)]
    fatal = [finding for finding in findings if finding.fatal]
    data = {"profile": target.name, "table": table.name, "graphs": [str(file) for file in files], "findings": findings}
    asked = f" (the newest table that is not newer than its TensorRT {target.stack.tensorrt})"
    told = asked if table.version != target.stack.tensorrt else ""
    count = "nothing to say" if not findings else f"{len(findings)} {'finding' if len(findings) == 1 else 'findings'}"
    graphs = "1 graph" if len(files) == 1 else f"{len(files)} graphs"
    out.result(
        data, f"{table.name} for `{target.name}`{told}, {graphs}: {count}", *in_words(findings, most=len(findings))
    )
    if fatal:
        nodes = "1 node" if len(fatal) == 1 else f"{len(fatal)} nodes"
        raise EnvironmentMismatch(
            f"{table.name} would reject or miscompile {nodes}. The list says what to do about each."
        )


def _own_profile(path: Path) -> str | None:
    """The profile that a folder was exported for."""
    from exporter.job import Job
    from exporter.workspace import Workspace

    return Job.read(Workspace(path)).profile if (path / "job.json").is_file() else None


def _graphs(path: Path, stack: Stack) -> list[Path]:
    """The file, or a folder's graphs: those with the flavour or plugins of the stack where it has them, the plain ones else."""
    from exporter.bundle import MANIFEST, Bundle
    from exporter.errors import UsageError
    from exporter.flavours._apply import plain_name
    from exporter.graphset import GraphSet

    if path.is_file() and path.suffix == ".onnx":
        return [path]
    folder = path / "graphs"
    if not (folder / "graphs.json").is_file():
        raise UsageError(
            f"{path} is neither an .onnx file nor a folder with graphs/graphs.json. `edgetrim export` makes one."
        )
    if (path / MANIFEST).is_file():
        Bundle.open(path)
    graphs = GraphSet.load(folder)
    files = [file if f".{stack.flavour}." in file else plain_name(file) for file in graphs.roles()]
    return [folder / (graphs.plugged.get(file, file) if stack.plugins else file) for file in files]
