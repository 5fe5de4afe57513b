"""What a search has found out, a line of JSON each, on disk before it goes on: a search that was killed asks only what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.workspace import write_bytes


class Journal:
    """Key → value, in a file that belongs to one search."""

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        """Begin, or go on.

        Args:
            made_from: what every value depends on, by name, as JSON knows it.
        Raises:
            UsageError: the file is another search's; says what is different.
        """
        self.path = path
        self.known: dict[str, Any] = {}
        wanted = json.loads(json.dumps(made_from))
        lines = _lines(path)
        if lines:
            before = lines[0].get("made_from")
            if not isinstance(before, dict):
                raise UsageError(f"{path} is not the journal of a search. Choose another --output, or remove it.")
            if before != wanted:
                changed = [name for name in {**before, **wanted} if before.get(name) != wanted.get(name)]
                raise UsageError(
                    f"{path} is of another search: {', '.join(changed)} differ. Choose another --output, or remove it."
                )
            self.known = {line["key"]: line["value"] for line in lines[1:] if {"key", "value"} <= set(line)}
        kept = [{"made_from": wanted}, *({"key": k, "value": v} for k, v in self.known.items())]
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def add(self, key: str, value: Any) -> None:
        """Remember; on disk before it returns."""
        self.known[key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: Path) -> list[dict[str, Any]]:
    """As far as they can be read: the last one may be half-written.

    Raises:
        UsageError: not even the first one can be.
    """
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict):
            break
        found.append(entry)
    if not found:
        raise UsageError(f"{path} is not the journal of a search. Choose another --output, or remove it.")
    return found
