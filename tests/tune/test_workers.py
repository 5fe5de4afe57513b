"""Where the work is done makes no difference to what comes back."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import EnvironmentMismatch
from exporter.job import EMBEDDED, Job
from exporter.tune import measure
from exporter.tune.workers import here, on_ray

SPECS = ("visionzip:keep=32", "random:keep=16", "fastv:keep=999")
TASKS = [measure.Task(Job(EMBEDDED, (spec,), "cpu_fp32"), measure.Asking(None, 4), 0, 8) for spec in SPECS]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "127.0.0.1:port{}"])
def test_an_address_where_nobody_answers(form: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = form.format(free.getsockname()[1])
        with (
            pytest.raises(EnvironmentMismatch, match=f"no Ray cluster at {address}.*ray start --head"),
            on_ray(address),
        ):
            pass


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentMismatch, match=r"pip install 'edgetrim\[ray\]'"), on_ray(None):
        pass


def test_what_does_not_fit_comes_back_in_words() -> None:
    assert "`keep` must be in 1..64" in dict(here(measure.ask, TASKS))[2]["left_out"]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Of two CPUs, which `on_ray` finds and leaves running."""
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray leaves a token in the home folder
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_what_this_process_gives(cluster: Any) -> None:
    with on_ray(None) as workers:
        found = dict(workers(measure.ask, TASKS))
    assert found == dict(here(measure.ask, TASKS))
    assert cluster.is_initialized()
