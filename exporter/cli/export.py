"""`edgetrim export`: checkpoint and reductions → ONNX graphs."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli import _options as options
from exporter.cli._output import Output


@click.command()
@options.checkpoint_argument(required=False)
@options.reduce_option
@options.profile_option()
@options.output_option()
@options.frames_option
@options.image_size_option
@options.clip_model_option
@options.quantizer_options
@options.json_option
def command(
    checkpoint: str,
    reductions: tuple[str, ...],
    profile: str,
    output: Path,
    frames: int,
    image_size: tuple[int, int] | None,
    clip: str | None,
    quantizer: str | None,
    calibration: str | None,
    as_json: bool,
) -> None:
    """Write the graphs of CHECKPOINT with the reductions in them.

    CHECKPOINT is a folder in Hugging Face layout, a hub id, or `embedded` (the default). Results of later stages in the
    same folder, which no longer belong to these graphs, are removed. After a crash or a kill the same command goes on with the
    weights that were written. Exit code 5 where a graph has a node that the profile's TensorRT would refuse or get wrong (`lint`).
    """
    from exporter import pipeline
    from exporter.cli import _results
    from exporter.job import Job
    from exporter.workspace import Workspace

    out = Output(as_json)
    job = Job(checkpoint, reductions, profile, frames, image_size, clip, quantizer, calibration)
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
