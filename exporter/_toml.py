"""TOML that people write, read with a limit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from exporter.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST = 64 * 1024
"""Bytes; two screens of text are a fraction of it."""


def read_toml(path: Path, kind: str, largest: int = LARGEST) -> dict[str, Any]:
    """The table in a TOML file.

    Args:
        kind: what the file is, for errors: "profile".
    Raises:
        UsageError: it cannot be read, is larger than `largest` bytes, or is no TOML.
    """
    title = f"{kind.capitalize()} {path}"
    try:
        with path.open("rb") as file:
            raw = file.read(largest + 1)
    except OSError as e:
        raise UsageError(f"{title} cannot be read: {e.strerror}.") from e
    if len(raw) > largest:
        raise UsageError(f"{title} is longer than {largest // 1024} KiB. That is not a {kind}.")
    try:
        return tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError(f"{title} is not valid TOML: {e}.") from e
