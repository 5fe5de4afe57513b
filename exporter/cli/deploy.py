"""`edgetrim deploy`: bring a bundle to devices, and check it there before it goes live."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli import _options as options
from exporter.cli._output import Output, table

if TYPE_CHECKING:
    from exporter.deploy.deploy import Outcome
    from exporter.deploy.fleet import Done

THROUGH = ("copy", "build", "validate", "bench")


@click.command()
@options.folder_argument
@options.devices_options
@click.option(
    "--through", type=click.Choice(THROUGH), default="bench", show_default=True,
    help="How far to check on the device before the bundle goes live; each includes those before it.",
)  # fmt: skip
@click.option(
    "--not-slower", is_flag=True,
    help="Time the live bundle there too, in turn: what is slower than the profile's gates allow does not go live (exit code 4).",
)  # fmt: skip
@click.option(
    "--install", "wheels", multiple=True, type=click.Path(path_type=Path), metavar="WHEEL",
    help="Install edgetrim on the device from this wheel first; repeat for wheels of what it needs, where the device has no network.",
)  # fmt: skip
@click.option(
    "--keep", type=click.IntRange(1), default=2, show_default=True, metavar="N",
    help="Releases that stay on the device, the live one included.",
)  # fmt: skip
@options.signers_option
@click.option("--dry-run", is_flag=True, help="Stop behind the preflight: change nothing.")
@options.json_option
def command(
    folder: Path, to: tuple[str, ...], fleet: Path | None, config: Path | None, jobs: int, through: str, not_slower: bool, wheels: tuple[Path, ...],
    keep: int, signers: Path | None, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Bring the bundle FOLDER to devices, build, validate and time it there, then make it live.

    A device needs an SSH server whose host key is known, and Python. Preflight reads whether the bundle fits before anything is
    sent (exit code 5 if not). Only files that the device lacks are sent; a deployment that broke off goes on where it was. The
    live bundle, FOLDER/current there, changes in one step and only after every check; `edgetrim rollback` changes it back. The
    record made on the device lands in devices/ of the bundle.
    """
    from exporter.bundle import Bundle
    from exporter.deploy import deploy
    from exporter.deploy import fleet as fleets
    from exporter.errors import UsageError

    out = Output(as_json)
    if not_slower and through == "copy":
        raise UsageError("--not-slower runs the bundle there, which --through copy does not.")
    hosts = fleets.named(to, fleet)
    request = deploy.Request(through, not_slower, tuple(deploy.wheel(w) for w in wheels), keep, dry_run, config)
    with out.stage("verify"):
        bundle = Bundle.open(folder)
        if signers is not None:
            bundle.signer(signers)
    with out.stage("deploy") as log:
        done = fleets.each(
            hosts,
            lambda host, stop: deploy.deploy(bundle, host, request, lambda text: log(f"{host.label}: {text}"), stop),
            jobs,
        )
    out.result([_data(d) for d in done], *_parts(done, dry_run))
    fleets.raise_failed(done)


def _data(done: Done[Outcome]) -> dict[str, Any]:
    if done.error is not None:
        return {"host": done.host.label, "ok": False, "error": str(done.error), "exit_code": done.error.exit_code}
    return {"host": done.host.label, "ok": True, "outcome": done.result}


def _parts(done: list[Done[Outcome]], dry: bool) -> list[Any]:
    parts: list[Any] = []
    if len(done) == 1 and (one := done[0].result) is not None:
        marks = {True: "fits", False: "DOES NOT FIT", None: ""}
        rows = [(r.what, r.found, r.expected, marks[r.fits]) for r in one.preflight]
        parts.append(table(f"Preflight of {one.host}", ("", "found", "expected", ""), rows))
        if one.compared:
            compared = [
                (s, f"{old:.1f} ms", f"{new:.1f} ms", f"{new / old:.2f}×" if old else None)
                for s, old, new in one.compared
            ]
            parts.append(table("Medians there", ("stage", ">record before", ">now", ">ratio"), compared))
    title = "Would be deployed" if dry else "Deployed"
    parts.append(table(title, ("device", "", ">sent", "live", "record"), [_row(d, dry) for d in done]))
    return parts


def _row(done: Done[Outcome], dry: bool) -> tuple[object, ...]:
    from exporter.report.report import in_bytes

    if (found := done.result) is None:
        return (done.host.label, "failed", None, None, None)
    words = "fits" if dry else "was live already" if found.live == found.before else "live"
    return (done.host.label, words, in_bytes(found.missing_bytes), found.live and found.live[:12], found.record)
