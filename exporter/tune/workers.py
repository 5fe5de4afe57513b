"""Where the pieces of a search are worked on: here, one after another, or on a Ray cluster."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from exporter.errors import EnvironmentMismatch, ExportError

PATIENCE_S = 10.0
"""Seconds that a cluster has to answer; Ray itself tries for minutes."""


class Workers(Protocol):
    """Calls a function of a module once per task. Yields (place of the task, what it returned) as they come."""

    def __call__(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]: ...


def here(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """In this process, in order."""
    for place, task in enumerate(tasks):
        yield place, function(task)


@contextmanager
def on_ray(address: str | None) -> Iterator[Workers]:
    """Workers of a Ray cluster, each with one CPU. They need EdgeTrim, and the same paths as here.

    Args:
        address: of a cluster, as `ray.init` takes it; None: one of this machine's own, for as long as the block.
    Raises:
        EnvironmentMismatch: Ray is not installed, or there is no cluster.
    """
    _require_answer(address)
    try:
        import ray
    except ImportError as e:
        raise EnvironmentMismatch("`--ray` needs Ray. Install it: pip install 'edgetrim[ray]'.") from e
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise _no_cluster(address, e) from e

    def call(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        remote = ray.remote(num_cpus=1)(function)
        places = {remote.remote(task): place for place, task in enumerate(tasks)}
        while places:
            (ready,), _ = ray.wait(list(places), num_returns=1)
            try:
                value = ray.get(ready)
            except ray.exceptions.RayError as e:
                raise ExportError(
                    f"A Ray worker failed: {str(e).strip().splitlines()[-1]} Start again: what was found so far is kept."
                ) from e
            yield places.pop(ready), value

    try:
        yield call
    finally:
        if mine:
            ray.shutdown()


def _require_answer(address: str | None) -> None:
    """Raises EnvironmentMismatch: nobody answers at "host:port" or "ray://host:port". Other addresses ("auto") name no port."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        with socket.create_connection((host, int(port)), PATIENCE_S):
            pass
    except (OSError, ValueError, OverflowError) as e:
        raise _no_cluster(address, e) from e


def _no_cluster(address: str | None, why: Exception) -> EnvironmentMismatch:
    where = address or "this machine"
    return EnvironmentMismatch(f"There is no Ray cluster at {where} ({why}). Start one with `ray start --head`.")
