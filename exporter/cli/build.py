"""`edgetrim build`: graphs → engines of the profile's backend."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli import _options as options
from exporter.cli._output import Output


@click.command()
@options.folder_argument
@click.option(
    "--strip-weights",
    is_flag=True,
    help="Build TensorRT engines without weights: whoever opens them takes those of the graphs, so the bundle holds them once.",
)
@options.json_option
def command(folder: Path, strip_weights: bool, as_json: bool) -> None:
    """Build the engines of FOLDER's graphs, for the profile they were exported for.

    An engine that was built before, of the same graph for the same GPU, is taken from the cache (EDGETRIM_CACHE names its folder,
    EDGETRIM_CACHE=off does without).

    Exit code 5 where the profile's engines have to be built on the device: copy the folder there and run this again.
    """
    from exporter import pipeline
    from exporter.cli import _results
    from exporter.graphset import GraphSet
    from exporter.job import Job
    from exporter.workspace import Workspace

    out = Output(as_json)
    with Workspace(folder).locked() as work:
        job = Job.read(work)
        with out.stage(f"build for {Path(job.profile).stem}") as log:
            pipeline.run_build(work, log, strip_weights)
        graphs = GraphSet.load(work.graphs)
        found = _results.engines(work, job, graphs)
    data = {"folder": folder, "profile": job.profile, **found.data}
    out.result(
        data,
        _results.headline(job, graphs),
        *found.parts,
        f"Engines: {folder / 'engines'}. Next: `edgetrim validate {folder}`.",
    )
