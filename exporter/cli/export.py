"""`edgetrim export`: checkpoint and reductions → ONNX graphs."""

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
@options.json_option
def command(
    job: Job,
    output: Path,
    as_json: bool,
) -> None:
    """Write the graphs of CHECKPOINT with the reductions in them.

    CHECKPOINT is a folder in Hugging Face layout, a hub id, or `embedded` (the default). Results of later stages in the
    same folder, which no longer belong to these graphs, are removed. After a crash or a kill the same command goes on with the
    weights that were written. Exit code 5 where a graph has a node that the profile's TensorRT would refuse or get wrong (`lint`).
    """
    from exporter import pipeline
    from exporter.cli import _results
    from exporter.workspace import Workspace

    out = Output(as_json)
    job.plan()  # refuse what does not fit before the folder is made
    with Workspace(output).locked() as work:
        with out.stage("export") as log:
            graphs = pipeline.run_export(job, work, log, out.warn)
        pipeline.check_graphs(work, out.warn)
        found = _results.engines(work, job, graphs)
    data = {"folder": output, **_results.described(job, graphs), "graphs": found.data["engines"]}
    out.result(
        data,
        _results.headline(job, graphs),
        *found.parts,
        f"Graphs: {output / 'graphs'}. Next: `edgetrim build {output}`.",
    )
