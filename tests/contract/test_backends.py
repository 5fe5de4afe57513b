"""What every backend must do, walked over whatever lies in exporter/backends/: a new file is picked up by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import exporter.backends
from exporter import _discover
from exporter.backends._contract import Backend
from exporter.errors import EnvironmentMismatch, ExportError, UsageError
from profiles import _schema

NAMES = _discover.names(exporter.backends)


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    found = _discover.load(exporter.backends, "backend", request.param).BACKEND
    assert isinstance(found, Backend)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_importing_is_light(name: str) -> None:
    """Listing backends and asking what is missing loads no framework and no runtime."""
    code = (
        f"import sys; from exporter.backends.{name} import BACKEND as b; assert b.name == {name!r}, b.name; b.missing(); "
        "b.missing_to_run(); heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_missing_is_said_in_a_sentence(backend: Backend) -> None:
    for missing in (backend.missing(), backend.missing_to_run()):
        assert missing is None or missing.rstrip().endswith("."), missing


def test_an_unknown_option_is_refused(backend: Backend, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no option 'nonsense'"):
        backend.build(tmp_path / "x.onnx", ("vision",), [], tmp_path, {"nonsense": 1}, lambda text: None)


def test_a_missing_graph_is_named_and_nothing_is_left(backend: Backend, tmp_path: Path) -> None:
    if backend.missing():
        pytest.skip(str(backend.missing()))
    with pytest.raises(ExportError, match=r"There is no graph .*x\.onnx"):
        backend.build(tmp_path / "x.onnx", ("vision",), [], tmp_path / "out", {}, lambda text: None)
    assert not list(tmp_path.rglob("*.*"))


def test_a_runner_opens_late_or_says_why_not(backend: Backend, tmp_path: Path) -> None:
    """Nothing is loaded before `with`; a backend that cannot run says so at once."""
    if backend.missing_to_run() is None:
        backend.runner(tmp_path / "x.onnx")
    else:
        with pytest.raises(EnvironmentMismatch):
            backend.runner(tmp_path / "x.onnx")


def test_profiles_name_backends_that_exist() -> None:
    used = {_schema.load(name).stack.backend for name in _schema.names()}
    assert used <= set(NAMES)
