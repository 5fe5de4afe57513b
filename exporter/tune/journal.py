"""What a search has found out, a line of JSON each, on disk before it goes on: a search that was killed asks only what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from exporter._typed import LARGEST, parsed, typed
from exporter.errors import UsageError
from exporter.tune.found import Refused
from exporter.workspace import write_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    made_from: dict[str, Any]


@dataclass(frozen=True)
class Line:
    key: str
    value: Any


class Journal:
    """Key → value, in a file that belongs to one search."""

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        """Begin, or go on.

        Args:
            made_from: what every value depends on, by name, as JSON knows it.
        Raises:
            UsageError: the file is another search's, says what is different; or a line of it is damaged.
        """
        self.path = path
        self.known: dict[str, Any] = {}
        wanted = Header(json.loads(json.dumps(made_from)))
        if path.is_file():
            header, lines = _read(path)
            before, now = header.made_from, wanted.made_from
            if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
                raise UsageError(
                    f"{path} is of another search: {', '.join(changed)} differ. Choose another --output, or remove it."
                )
            self.known = {line.key: line.value for line in lines}
        kept = [asdict(wanted), *(asdict(Line(*entry)) for entry in self.known.items())]
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._count = len(kept)
        self._lines = {key: number for number, key in enumerate(self.known, 2)}

    def add(self, key: str, value: Any) -> None:
        """Remember; on disk before it returns."""
        line = json.dumps({"key": key, "value": value})
        self.known[key] = json.loads(line)["value"]
        self._count += 1
        self._lines[key] = self._count
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self, key: str, kind: type[T], check: Callable[[T], None] = lambda value: None) -> T | Refused:
        """What is known of a key.

        Args:
            check: raises ValueError if the value cannot be.
        Raises:
            UsageError: it is none of this kind; names the line.
        """
        value = self.known[key]
        try:
            if isinstance(value, dict) and "left_out" in value:
                return typed(Refused, value)
            found = typed(kind, value)
            check(found)
            return found
        except ValueError as e:
            raise UsageError(
                f"{self.path}: line {self._lines[key]}, '{key}', is damaged: {e}. Remove that line: it is found out again."
            ) from e


def _read(path: Path) -> tuple[Header, list[Line]]:
    """The file's lines; the last one may be half-written.

    Raises:
        UsageError: it is another file, or damaged.
    """
    with path.open("rb") as file:
        raw = file.read(LARGEST + 1)
    try:
        first, _, rest = raw.partition(b"\n")
        if len(raw) > LARGEST:
            raise ValueError
        header = typed(Header, parsed(first))
    except ValueError as e:
        raise UsageError(f"{path} is not the journal of a search. Choose another --output, or remove it.") from e
    found: list[Line] = []
    lines = rest.split(b"\n")
    for number, line in enumerate(lines, 2):
        try:
            found.append(typed(Line, parsed(line)))
        except ValueError as e:
            if number == len(lines) + 1:  # what comes behind the last line's end
                break
            raise UsageError(f"{path}: line {number} is damaged: {e}. Remove that line: it is found out again.") from e
    return header, found
