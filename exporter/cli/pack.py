"""`edgetrim pack`: the report, and the manifest that makes a folder a bundle."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from exporter.cli import _options as options
from exporter.cli._output import Output


def _layouts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    import exporter.layouts
    from exporter import _discover

    return [CompletionItem(n) for n in _discover.names(exporter.layouts) if n.startswith(incomplete)]


@click.command()
@options.folder_argument
@click.option(
    "--layout", "-l", "layouts", multiple=True, metavar="NAME", shell_complete=_layouts,
    help="Also write what another runtime needs to load the graphs, such as genai; repeat for several. docs/bundle.md has them.",
)  # fmt: skip
@click.option(
    "--sign", "key", type=click.Path(path_type=Path), metavar="KEY",
    help="Sign the manifest with this OpenSSH key; `edgetrim verify --signers` checks it.",
)  # fmt: skip
@options.json_option
def command(folder: Path, layouts: tuple[str, ...], key: Path | None, as_json: bool) -> None:
    """Write FOLDER's report and the manifest with the hash of every file.

    From then on the folder is a bundle: what is in it is what the manifest says, or it is not loaded. The same folder gives the
    same bytes.

    A layout's files lie beside the graphs and share their weights, see docs/bundle.md. What its runtime has no place for is refused.
    """
    from exporter import pipeline
    from exporter.report.report import in_bytes
    from exporter.stages.report import REPORT
    from exporter.workspace import Workspace

    out = Output(as_json)
    with Workspace(folder).locked() as work:
        with out.stage("pack"):
            bundle = pipeline.run_pack(work, key, layouts)
    files = bundle.manifest["files"]
    data = {"folder": folder, "report": folder / REPORT, "manifest": bundle.manifest}
    out.result(data, f"Bundle: {folder}, {len(files)} files, {in_bytes(bundle.bytes)}", f"Report: {folder / REPORT}")
