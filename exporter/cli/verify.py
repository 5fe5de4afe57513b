"""`edgetrim verify`: is a bundle what its manifest says, and who says so?"""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli import _options as options
from exporter.cli._output import Output


@click.command()
@options.folder_argument
@options.signers_option
@options.json_option
def command(folder: Path, signers: Path | None, as_json: bool) -> None:
    """Compare every file of the bundle FOLDER with its manifest, and the manifest with its signature.

    Exit code 6 if one differs, is missing or is not in the manifest, or if nobody who is trusted signed it. Nothing of the bundle
    is loaded.
    """
    from exporter.bundle import Bundle
    from exporter.report.report import in_bytes

    out = Output(as_json)
    with out.stage("verify"):
        bundle = Bundle.open(folder)
        signer = None if signers is None else bundle.signer(signers)
    data = {
        "folder": folder,
        "verified": True,
        "signer": signer,
        "manifest_sha256": bundle.digest,
        "bytes": bundle.bytes,
    }
    signed = f", signed by {signer}" if signer else ""
    count = len(bundle.manifest["files"])
    out.result(
        data,
        f"Bundle {folder}: {count} files, {in_bytes(bundle.bytes)}, every hash is right{signed}",
        f"Manifest: {bundle.digest}",
    )
