"""What all tests share. None of them needs a network; those for a GPU are skipped where there is none."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["EDGETRIM_CACHE"] = "off"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


needs_rtx = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="TensorRT-RTX is there for x86-64 Linux only"
)
"""Where `make` installs TensorRT-RTX it must be there: without it these tests fail."""

needs_genai = pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info < (3, 11),
    reason="make installs onnxruntime-genai on Linux, for Python 3.11 on",
)
"""Likewise."""


def for_one_gpu(profile: str, folder: Path) -> str:
    """That profile for SM 8.6 alone, as a file in `folder`: for each further GPU the builder compiles all kernels again.
    Engines for several are built in tests/stages/test_rtx.py."""
    from profiles import _schema

    text = (_schema.FOLDER / f"{profile}.toml").read_text()
    file = folder / f"one_{profile}.toml"
    file.write_text(re.sub(r"(?m)^compute_capabilities = .*$", "compute_capabilities = [86]", text))
    return str(file)


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


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if wanted and not _gpu():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA driver on this machine"))


def _group(item: pytest.Item) -> str:
    """Tests that share a worker in a parallel run: those of a file, for their fixtures; where a file names `SPLIT`, a parameter
    of its tests, those of one value or one class, for balance."""
    callspec, split = getattr(item, "callspec", None), getattr(getattr(item, "module", None), "SPLIT", None)
    if callspec is None or split not in callspec.params:
        return str(item.path)
    value = callspec.params[split]
    return f"{item.path}::{value if isinstance(value, str | tuple) else type(value).__name__}"


def _gpu() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False
