"""The library of plugins: asked for where a graph needs it, and loaded by TensorRT before anything is parsed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.backends import _plugins
from exporter.bundle import sha256
from exporter.errors import EnvironmentMismatch
from plugins import _library


def test_a_plain_graph_needs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(_library.VARIABLE, str(tmp_path / "none.so"))
    assert _plugins.needed(tmp_path / "prefill.onnx") is None


def test_a_library_that_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(_library.VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(EnvironmentMismatch, match=r"prefill\.plugins\.onnx has plugins in it(.|\n)*cmake -S"):
        _plugins.needed(tmp_path / "prefill.plugins.onnx")


def test_a_library_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(b"\x7fELF")
    monkeypatch.setenv(_library.VARIABLE, str(library))
    assert _plugins.needed(tmp_path / "prefill.plugins.engine") == {"library": str(library), "sha256": sha256(library)}


def tensorrt(handle: object) -> tuple[Any, list[str]]:
    loaded: list[str] = []

    def load_library(path: str) -> object:
        loaded.append(path)
        return handle

    registry = SimpleNamespace(load_library=load_library)
    return SimpleNamespace(__name__="tensorrt", __version__="10.3.0", get_plugin_registry=lambda: registry), loaded


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every library was built with TensorRT's headers. What one without is, see tests/plugins/test_python.py."""
    monkeypatch.setattr(_library, "Library", lambda file: SimpleNamespace(wrapped=True))


@pytest.mark.usefixtures("wrapped")
def test_tensorrt_loads_it() -> None:
    trt, loaded = tensorrt(object())
    _plugins.load(trt, "/some/lib.so")
    assert loaded == ["/some/lib.so"]


@pytest.mark.usefixtures("wrapped")
def test_tensorrt_does_not_take_it() -> None:
    with pytest.raises(EnvironmentMismatch, match=r"tensorrt 10\.3\.0 cannot load /some/lib\.so(.|\n)*TENSORRT_ROOT"):
        _plugins.load(tensorrt(None)[0], "/some/lib.so")
