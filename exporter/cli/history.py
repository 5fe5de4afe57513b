"""`edgetrim history`: how a profile's latency went."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli import _options as options
from exporter.cli._output import Output, table


@click.command()
@click.argument("profile")
@options.baselines_option
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), default=Path("history.html"), show_default=True,
    metavar="FILE", help="The page.",
)  # fmt: skip
@options.json_option
def command(profile: str, baselines: Path, output: Path, as_json: bool) -> None:
    """Plot the stored latency baselines of PROFILE: every session, stage by stage.

    `edgetrim bench FOLDER --save-baseline` stores them.
    """
    from exporter import baselines as store
    from exporter.errors import UsageError, nearest
    from exporter.report import history
    from exporter.workspace import write_text

    found = store.stored(baselines, profile)
    if not found:
        known = [p.name for p in baselines.glob("*") if p.is_dir()]
        raise UsageError(f"{baselines} has no baseline of profile '{profile}'. {nearest(profile, known)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, history.render(profile, [baseline for _, baseline in found]))
    except OSError as e:
        raise UsageError(f"Cannot write to {output}: {e.strerror}. Choose another --output.") from e
    rows = []
    for path, baseline in found:
        sessions = [s for g in baseline.generations for s in g.sessions]
        dates = (sessions[0].utc[:10], sessions[-1].utc[:10]) if sessions else (None, None)
        model = f"{baseline.conditions.get('checkpoint')}, {baseline.conditions.get('reductions')}"
        rows.append((path.name, model, len(baseline.generations), len(sessions), *dates))
    data = {"profile": profile, "page": output, "baselines": [{"file": p, "baseline": b} for p, b in found]}
    columns = ("baseline", "model", ">bundles", ">sessions", "from", "to")
    Output(as_json).result(data, table(f"Baselines of {profile}", columns, rows), f"Page: {output}")
