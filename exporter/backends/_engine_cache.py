"""Engines that were built before, by the hash of everything they were built from.

An engine takes minutes on a device; another keep rate leaves the vision tower's as it was. The folder is
`$EDGETRIM_CACHE`, else `edgetrim/` in `$XDG_CACHE_HOME` or `~/.cache`; `EDGETRIM_CACHE=off` does without. Files that an output
folder still has are linked, not copied, where the file system allows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter._typed import read_json
from exporter.bundle import sha256
from exporter.workspace import write_bytes, write_text

LIMIT = 16 * 2**30
"""Bytes of engines; the ones not used for longest go first."""
LARGEST_FACTS = 16 * 2**20
LARGEST_LEARNT = 512 * 2**20
"""Bytes that are read of a file with facts, or with what TensorRT learnt; a larger one is none of ours."""


def key(parts: Mapping[str, Any]) -> str:
    """Hash of JSON values, whatever the order of their names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class EngineCache:
    """`<key>.engine` and, written behind it, `<key>.json` with its hash and the builder's facts. Damage and losses are misses."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self._limit = folder, limit

    @classmethod
    def default(cls) -> EngineCache | None:
        """The user's; None where it is switched off."""
        told = os.environ.get("EDGETRIM_CACHE", "")
        if told == "off":
            return None
        if told:
            return cls(Path(told))
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return cls(Path(base, "edgetrim")) if os.path.isabs(base) else None  # a user without a home has none

    def fetch(self, key: str, target: Path) -> dict[str, Any] | None:
        """Put the engine of that key at `target`; its facts, or None if there is none whose hash is right."""
        engine, entry = self._paths(key)
        try:
            told = read_json(entry, LARGEST_FACTS)
            facts = dict(told["facts"])
            _place(engine, target)
            if sha256(target) == told["sha256"]:
                os.utime(entry)
                return facts
        except (OSError, ValueError, KeyError, TypeError):
            pass
        for path in (target, entry, engine):
            with contextlib.suppress(OSError):
                path.unlink()
        return None

    def store(self, key: str, engine: Path, digest: str, facts: Mapping[str, Any]) -> None:
        """Keep an engine. A full or read-only disk is no error: the engine is where it was asked for."""
        kept, entry = self._paths(key)
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = kept.with_name(f".{kept.name}.{os.getpid()}")
            try:
                _place(engine, beside)
                beside.replace(kept)
            finally:
                beside.unlink(missing_ok=True)
            write_text(entry, json.dumps({"sha256": digest, "facts": facts}))
            self._forget_oldest()

    def recall(self, name: str) -> bytes:
        """What TensorRT learnt before on such a machine (timings, compiled kernels): bytes of its own, which it checks; b"" if nothing."""
        path = self.folder / name
        try:
            return path.read_bytes() if path.stat().st_size <= LARGEST_LEARNT else b""
        except OSError:
            return b""

    def learn(self, name: str, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(self.folder / name, data)

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.engine", self.folder / f"{key}.json"

    def _forget_oldest(self) -> None:
        """Until the rest fits; the newest always stays."""
        entries = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for place, entry in enumerate(entries):
            engine = entry.with_suffix(".engine")
            with contextlib.suppress(FileNotFoundError):
                total += engine.stat().st_size
            if place and total > self._limit:
                entry.unlink(missing_ok=True)
                engine.unlink(missing_ok=True)


def _place(source: Path, target: Path) -> None:
    """The same file under another name; a copy across file systems."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
