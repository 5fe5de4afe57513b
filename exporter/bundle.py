"""A bundle: an output folder with a manifest that names every file by its hash. Only what a verified manifest names is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter._typed import parsed
from exporter.errors import UsageError, VerificationError
from exporter.graphset import GraphSet

MANIFEST = "manifest.json"
SCHEMA = 1
DEVICES = "devices"
"""Records that devices made of a bundle lie in it and are no part of it."""
LARGEST_MANIFEST = 16 * 2**20
"""Bytes."""
SIGNATURE = "manifest.json.sig"
"""Detached, see `exporter.signature`."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file below `folder` but the manifest and dot-files: relative name → {"sha256", "bytes"}, sorted."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not _belongs(name):
            continue
        if path.is_symlink():
            raise VerificationError(f"{path} is a link. A bundle holds files only; remove it.")
        if path.is_file():
            found[name.as_posix()] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    return found


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `manifest` as written by `pack`."""

    folder: Path
    manifest: dict[str, Any]
    digest: str
    """SHA-256 of the manifest's bytes: what this bundle is, in one number."""

    @property
    def bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Bundle:
        """Read a bundle.

        Args:
            verify: compare every file with its hash.
        Raises:
            UsageError: no bundle there. VerificationError: it is not what its manifest says.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise UsageError(f"{folder} is no bundle: there is no {MANIFEST}. `edgetrim pack {folder}` writes it.")
        if path.stat().st_size > LARGEST_MANIFEST:
            raise VerificationError(f"{path} is larger than {LARGEST_MANIFEST // 2**20} MiB. That is not a manifest.")
        try:
            raw = path.read_bytes()
            manifest = parsed(raw)
            files = {str(name): dict(entry) for name, entry in manifest["files"].items()}
            schema = int(manifest["schema"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
            raise VerificationError(
                f"{path} is damaged ({type(e).__name__}: {e}). Pack or copy the bundle again."
            ) from e
        if schema != SCHEMA:
            raise VerificationError(
                f"{path} has schema {schema}; this edgetrim reads {SCHEMA}. Use the version that packed it."
            )
        for name, entry in files.items():
            if _leads_out(name):
                raise VerificationError(f"{path} names a file outside the bundle: {name!r}. Do not use it.")
            if not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("sha256"), str):
                raise VerificationError(f"{path} has no size or hash for {name!r}. Pack or copy the bundle again.")
        bundle = cls(folder, {**manifest, "files": files}, hashlib.sha256(raw).hexdigest())
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Compare every file with the manifest.

        Raises:
            VerificationError: names what is missing, changed or extra.
        """
        expected = self.manifest["files"]
        wrong = []
        for name, entry in expected.items():
            path = self.folder / name
            if path.is_symlink() or not path.is_file():
                wrong.append(f"{name} is missing")
            elif path.stat().st_size != entry.get("bytes"):
                wrong.append(f"{name} has {path.stat().st_size} bytes, expected {entry.get('bytes')}")
            elif sha256(path) != entry.get("sha256"):
                wrong.append(f"{name} was changed (its hash differs)")
        wrong += [f"{name} is not in the manifest" for name in contents_names(self.folder) if name not in expected]
        if wrong:
            raise VerificationError(
                f"{self.folder} is not what its manifest says: {'; '.join(wrong[:5])}{' …' if len(wrong) > 5 else ''}. "
                "Copy or pack it again."
            )

    def signer(self, signers: Path) -> str:
        """Who signed the manifest. Raises as `signature.verify`, and VerificationError if it has changed since it was opened."""
        from exporter import signature

        raw = (self.folder / MANIFEST).read_bytes()
        if hashlib.sha256(raw).hexdigest() != self.digest:
            raise VerificationError(f"{self.folder}/{MANIFEST} changed while it was verified. Try again.")
        return signature.verify(raw, self.folder / SIGNATURE, signers)

    @property
    def graphs(self) -> GraphSet:
        return GraphSet.load(self.folder / "graphs")


def contents_names(folder: Path) -> list[str]:
    """Names of the files that `contents` would hash, and of links, which it would refuse."""
    names = (p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file() or p.is_symlink())
    return [n.as_posix() for n in names if _belongs(n)]


def _belongs(name: Path) -> bool:
    """Whether a file at that place is part of a bundle: manifest and signature are not, nor dot-files, nor devices' records."""
    return (
        name.as_posix() not in (MANIFEST, SIGNATURE)
        and name.parts[0] != DEVICES
        and not any(p.startswith(".") for p in name.parts)
    )


def _leads_out(name: str) -> bool:
    """Whether a manifest's name is not that of a file below the bundle, on any system."""
    parts = name.replace("\\", "/").split("/")
    return not all(parts) or ".." in parts or "." in parts or ":" in parts[0] or "\0" in name


def identity(folder: Path) -> str:
    """What the graphs and engines of a folder are, as one SHA-256: evidence and the report may change meanwhile. A bundle is verified
    on the way.

    Raises:
        VerificationError: it is not what its manifest says.
    """
    if (folder / MANIFEST).is_file():
        files = Bundle.open(folder).manifest["files"]
    else:
        parts = [part for part in ("graphs", "engines") if (folder / part).is_dir()]
        files = {f"{part}/{name}": entry for part in parts for name, entry in contents(folder / part).items()}
    hashes = sorted((n, e["sha256"]) for n, e in files.items() if n.startswith(("graphs/", "engines/")))
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
