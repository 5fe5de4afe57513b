"""What all tests share. None of them needs a network; those for a GPU are skipped where there is none."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import NamedTuple

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Said(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def edgetrim(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run the command line in this process: `edgetrim("list", "--json").out`."""
    from exporter.cli import main

    def run(*arguments: object) -> Said:
        code = main([str(a) for a in arguments])
        return Said(code, *capsys.readouterr())

    return run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if wanted and not _gpu():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA driver on this machine"))


def _group(item: pytest.Item) -> str:
    """Tests that share a worker in a parallel run: those of a file, for their fixtures; those that walk all reductions are
    split by method, for balance."""
    callspec = getattr(item, "callspec", None)
    method = callspec.params.get("method") if callspec and item.path.name == "test_reductions.py" else None
    return str(item.path) if method is None else f"{item.path}::{type(method).__name__}"


def _gpu() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False
