"""An output folder: stages write beside and rename, so that what is there is whole; one process at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporter._typed import read_json
from exporter.errors import ExportError, UsageError

try:
    import fcntl
except ImportError:  # Windows has no fcntl; two processes in one folder are then the user's own risk
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
SCRATCH = ".tmp-"
"""Prefix of half-written files and folders; swept when the folder is opened."""
OLD = f"{SCRATCH}old-"
"""Prefix of a result while the new one takes its place."""
PART = ".part-"
"""Prefix of half-written folders to go on with."""


class Workspace:
    """The folder that `run` fills: graphs/, engines/, evidence/, report.html, manifest.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def graphs(self) -> Path:
        return self.folder / "graphs"

    @property
    def engines(self) -> Path:
        return self.folder / "engines"

    @property
    def evidence(self) -> Path:
        return self.folder / "evidence"

    @contextlib.contextmanager
    def locked(self) -> Iterator[Workspace]:
        """Hold the folder. What a killed run left half-written is removed.

        Raises:
            UsageError: it cannot be written, or another process holds it.
        """
        made = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as e:
            raise UsageError(f"Cannot write to {self.folder}: {e.strerror}. Choose another --output.") from e
        try:
            self._lock(handle)
        except BaseException:
            os.close(handle)  # the file stays: it is the other process's lock
            raise
        try:
            self._sweep()
            yield self
        finally:
            with contextlib.suppress(OSError):  # while still held: whoever has it open already is refused, not let in
                (self.folder / LOCK).unlink()
            os.close(handle)
            if made:
                with contextlib.suppress(OSError):  # only if nothing was written
                    self.folder.rmdir()

    def _lock(self, handle: int) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = os.path.samestat(os.fstat(handle), os.stat(self.folder / LOCK))
            except OSError:
                held = False  # another process has it, or had it until now and took the file away
            if not held:
                raise UsageError(
                    f"Another edgetrim is writing to {self.folder}. Wait for it or choose another --output."
                )

    def _sweep(self) -> None:
        """Remove what a killed run left half-written; a result that it had only moved aside comes back."""
        for left in self.folder.glob(f"{SCRATCH}*"):
            target = self.folder / left.name.removeprefix(OLD)
            if left.name.startswith(OLD) and not target.exists():
                left.rename(target)
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    @contextlib.contextmanager
    def fresh_scratch(self, name: str) -> Iterator[Path]:
        """A folder that vanishes after the block."""
        scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{name}-", dir=self.folder))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @contextlib.contextmanager
    def fresh(self, name: str) -> Iterator[Path]:
        """A new folder that becomes `name` when the block ends well, and vanishes when it does not."""
        scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{name}-", dir=self.folder))
        scratch.chmod(0o755)
        with self._becomes(name, scratch):
            yield scratch

    @contextlib.contextmanager
    def resumed(self, name: str, journal: str) -> Iterator[Path]:
        """As `fresh`, but if the process is killed the folder stays, and the next one gets it as it was left: `journal` is the file
        in it that tells what is whole. A folder without that file is of no use and removed."""
        scratch = self.folder / f"{PART}{name}"
        if scratch.exists() and not (scratch / journal).is_file():
            shutil.rmtree(scratch)
        scratch.mkdir(exist_ok=True)
        with self._becomes(name, scratch):
            yield scratch

    def forget_unfinished(self) -> None:
        """Remove what `resumed` left to go on with."""
        for left in self.folder.glob(f"{PART}*"):
            shutil.rmtree(left)

    @contextlib.contextmanager
    def _becomes(self, name: str, scratch: Path) -> Iterator[None]:
        try:
            yield
            target = self.folder / name
            old = self.folder / f"{OLD}{name}"
            if target.exists():
                target.rename(old)
            try:
                scratch.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def write(self, name: str, text: str) -> Path:
        """Write a text file atomically."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        return path

    def read_json(self, name: str, missing: str) -> Any:
        """A JSON file of the folder; `missing` says which verb writes it.

        Raises:
            UsageError: it is not there. ExportError: it cannot be read.
        """
        path = self.folder / name
        if not path.is_file():
            raise UsageError(f"There is no {path}. {missing}")
        try:
            return read_json(path)
        except ValueError as e:
            raise ExportError(f"{path} is damaged ({e}). {missing}") from e


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside, then rename."""
    beside = path.with_name(f"{SCRATCH}{path.name}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
