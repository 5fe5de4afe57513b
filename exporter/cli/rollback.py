"""`edgetrim rollback`: make the bundle live again that was before."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli import _options as options
from exporter.cli._output import Output, table


@click.command()
@options.devices_options
@options.json_option
def command(to: tuple[str, ...], fleet: Path | None, config: Path | None, jobs: int, as_json: bool) -> None:
    """Make the bundle live again that was before the last `edgetrim deploy`.

    It is verified by hash on the device first. Repeated, it goes forward again.
    """
    from exporter.deploy import deploy
    from exporter.deploy import fleet as fleets

    out = Output(as_json)
    with out.stage("roll back"):
        done = fleets.each(fleets.named(to, fleet), lambda host, stop: deploy.rollback(host, config, stop), jobs)
    data = [d.result or {"host": d.host.label, "error": str(d.error)} for d in done]
    rows = [
        (d.host.label, *((d.result["live"][:12], d.result["before"][:12]) if d.result else ("failed", None)))
        for d in done
    ]
    out.result(data, table("Rolled back", ("device", "live", "before"), rows))
    fleets.raise_failed(done)
