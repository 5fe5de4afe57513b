"""What an export has finished: data files, written part by part, and a journal of the parts. An export that was killed goes
on from there.

A part is kept if its hash is still that of its bytes, so nothing depends on what the system had written when the power went.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any

from exporter._typed import parsed, typed
from exporter.errors import ExportError
from exporter.workspace import SCRATCH, write_bytes

JOURNAL = ".journal"
CHUNK = 1 << 20
"""Bytes read at a time."""
WAITING = 8
"""Pieces that are made before the first of them is on its way to the disk, which takes now and then as long as several of them."""


@dataclass(frozen=True)
class Part:
    """A stretch of a data file. offset, size: in bytes. sha256: of those bytes. note: what its writer has to know to read it."""

    file: str
    name: str
    offset: int
    size: int
    sha256: str
    note: dict[str, Any] = field(default_factory=dict)


class Journal:
    """The finished parts of the data files in a folder: a line of JSON each, below a line that says what they are made from."""

    def __init__(self, folder: Path, made_from: Any) -> None:
        """Begin, or go on if there is a journal of what is made from the same. Of what an earlier export left in the folder only
        the data files that the journal names stay.

        Args:
            folder: empty, or as an earlier export left it.
            made_from: everything that what is written depends on, as JSON knows it.
        Raises:
            ExportError: the folder holds something that no export left there.
        """
        self._path = folder / JOURNAL
        found = self._read(json.loads(json.dumps(made_from)))
        names = {part.file for part in found}
        left = [path for path in folder.iterdir() if path.name != JOURNAL]
        if any(not path.name.startswith(SCRATCH) for path in left) and not self._path.is_file():
            raise ExportError(f"{folder} is not empty. Remove what is in it, or choose another folder.")
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in names:
                path.unlink()
        self._parts = {name: [part for part in found if part.file == name] for name in names}
        lines = [{"made_from": made_from}, *map(asdict, found)]
        write_bytes(self._path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def _read(self, made_from: Any) -> list[Part]:
        """The parts, as far as the journal can be read: its last line may be half-written."""
        try:
            first, *rest = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            if parsed(first) != {"made_from": made_from}:
                return []
        except (OSError, ValueError):
            return []
        found: list[Part] = []
        for line in rest:
            try:
                part = typed(Part, parsed(line))
            except ValueError:
                break
            if min(part.offset, part.size) < 0:
                break
            # What was written again took the place of what stood there.
            found = [p for p in found if p.file != part.file or p.offset + p.size <= part.offset]
            found.append(part)
        return found

    def parts(self, file: str) -> list[Part]:
        """What stands in this file, in order; whether it is still whole is for the reader to see."""
        return self._parts.get(file, [])

    def add(self, part: Part) -> None:
        """Its bytes are in the file."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(part)) + "\n")

    def close(self) -> None:
        """All is written: the folder is no longer one to go on from."""
        self._path.unlink()


class DataFile:
    """A file written part after part. Parts that the journal knows are kept, from the first on, as long as they are asked for in
    the same order and are whole."""

    def __init__(self, path: Path, journal: Journal) -> None:
        self.path, self._journal = path, journal
        self._kept = deque(journal.parts(path.name))
        self._file: BufferedRandom | None = None
        self._end = 0

    def __enter__(self) -> DataFile:
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.truncate(self._end)
        self._file.close()

    def part(
        self, name: str, pieces: Iterable[memoryview], align: int = 1, note: Mapping[str, Any] | None = None
    ) -> Part:
        """Where the part stands.

        Args:
            pieces: its bytes. Nothing is asked of them if the part is kept.
            align: what its offset is a multiple of; there are zeros up to it.
            note: goes into the journal, where the part is written.
        """
        part = self.kept(name, align)
        if part is None:
            part = replace(self._write(name, self._end + -self._end % align, pieces), note=dict(note or {}))
            self._journal.add(part)
            self._end = part.offset + part.size
        return part

    def kept(self, name: str, align: int = 1) -> Part | None:
        """The part, if it stands next in the file from before, and is whole. If not, nothing behind it is kept."""
        if not self._kept:
            return None
        part = self._kept.popleft()
        whole = (part.name, part.offset) == (name, self._end + -self._end % align) and self._hash(part) == part.sha256
        if not whole:
            self._kept.clear()
            return None
        self._end = part.offset + part.size
        return part

    @property
    def keeps(self) -> bool:
        """Whether there are parts from before that may be kept."""
        return bool(self._kept)

    def _hash(self, part: Part) -> str:
        assert self._file is not None
        self._file.seek(part.offset)
        digest, left = hashlib.sha256(), part.size
        buffer = memoryview(bytearray(CHUNK))
        while left and (count := self._file.readinto(buffer[: min(left, CHUNK)])):
            digest.update(buffer[:count])
            left -= count
        return digest.hexdigest()

    def _write(self, name: str, offset: int, pieces: Iterable[memoryview]) -> Part:
        assert self._file is not None
        self._file.seek(self._end)
        self._file.truncate()
        self._file.seek(offset)
        digest, size = hashlib.sha256(), 0
        pending: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1) as writer:  # the next pieces are made meanwhile
            for piece in pieces:
                if len(pending) == WAITING:
                    pending.popleft().result()
                pending.append(writer.submit(self._put, piece, digest))
                size += piece.nbytes
            for one in pending:
                one.result()
        self._file.flush()
        return Part(self.path.name, name, offset, size, digest.hexdigest())

    def _put(self, piece: memoryview, digest: hashlib._Hash) -> None:
        assert self._file is not None
        self._file.write(piece)
        digest.update(piece)
