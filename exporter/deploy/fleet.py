"""Many devices: a TOML file that lists them, and one task done on each. What fails on one stops no other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from exporter._toml import read_toml
from exporter.deploy.ssh import Host
from exporter.errors import ExportError, UsageError, nearest

LARGEST_FILE = 1024 * 1024
"""Bytes: tens of thousands of devices."""

T = TypeVar("T")


@dataclass(frozen=True)
class Done(Generic[T]):
    """What one device gave, or the error in its place."""

    host: Host
    result: T | None
    error: ExportError | None


def read(path: Path) -> list[Host]:
    """`hosts = ["user@one", "user@two:folder"]`. Raises UsageError."""
    table = read_toml(path, "fleet file", LARGEST_FILE)
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


def named(to: Sequence[str], file: Path | None) -> list[Host]:
    """The devices that are named one by one and in a fleet file, each once. Raises UsageError."""
    found = list(dict.fromkeys([*(Host.parse(text) for text in to), *(read(file) if file else [])]))
    if not found:
        raise UsageError("Which device? `--to USER@HOST`, or `--fleet FILE.toml` for many.")
    return found


def raise_failed(done: Sequence[Done[Any]]) -> None:
    """The devices' errors as one: with their exit code where they agree on it."""
    failed = [d.error for d in done if d.error is not None]
    if not failed:
        return
    if len(done) == 1:
        raise failed[0]
    words = "\n".join(f"  {e}" for e in failed)
    kinds = {type(e) for e in failed}
    kind = kinds.pop() if len(kinds) == 1 else ExportError
    raise kind(f"{len(failed)} of {len(done)} devices failed:\n{words}")
