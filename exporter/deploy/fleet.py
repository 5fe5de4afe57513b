"""Many devices: a TOML file that lists them, and one task done on each. What fails on one stops no other."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from exporter.deploy.ssh import Host
from exporter.errors import ExportError, UsageError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST_FILE = 1024 * 1024

T = TypeVar("T")


@dataclass(frozen=True)
class Done(Generic[T]):
    """What one device gave, or the error in its place."""

    host: Host
    result: T | None
    error: ExportError | None


def read(path: Path) -> list[Host]:
    """`hosts = ["user@one", "user@two:folder"]`. Raises UsageError."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
        table = tomllib.loads(raw.decode()) if len(raw) <= LARGEST_FILE else {}
    except OSError as e:
        raise UsageError(f"Fleet file {path} cannot be read: {e.strerror}.") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError(f"Fleet file {path} is not valid TOML: {e}.") from e
    for key in table:
        if key != "hosts":
            raise UsageError(f"Fleet file {path}: unknown key '{key}'. {nearest(key, ['hosts'])}")
    hosts = table.get("hosts")
    if not isinstance(hosts, list) or not hosts or not all(isinstance(h, str) for h in hosts):
        raise UsageError(f'Fleet file {path} must say hosts = ["user@one", "user@two:folder", …].')
    return [Host.parse(h) for h in hosts]


def each(hosts: Sequence[Host], task: Callable[[Host, threading.Event], T], jobs: int = 1) -> list[Done[T]]:
    """The task on every device, `jobs` at a time; in the order of `hosts`. `task` stops when the event it gets is set."""
    stop = threading.Event()

    def one(host: Host) -> Done[T]:
        try:
            return Done(host, task(host, stop), None)
        except ExportError as e:
            return Done(host, None, e)
        except OSError as e:
            return Done(
                host, None, ExportError(f"{host.label}: {e.strerror or e}{f': {e.filename}' if e.filename else ''}.")
            )

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        waiting = [pool.submit(one, host) for host in hosts]
        try:
            return [w.result() for w in waiting]
        except BaseException:
            stop.set()
            for w in waiting:
                w.cancel()
            raise
