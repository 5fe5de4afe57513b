from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.backends import _engine_cache, trt
from exporter.backends._contract import EngineRecord, Range
from exporter.backends._engine_cache import EngineCache
from exporter.bundle import sha256
from tests.backends.test_trt import DIM, PROFILES, build, decoder, ranges
from tests.conftest import needs_rtx

KEYS = [f"{n:064x}" for n in range(6)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGETRIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored(cache: EngineCache, key: str, content: bytes, at: Path) -> None:
    at.write_bytes(content)
    cache.store(key, at, sha256(at), {"layers": len(content)})


def test_what_was_stored_comes_back_and_nothing_else(tmp_path: Path) -> None:
    cache, target = EngineCache(tmp_path / "cache"), tmp_path / "engine"
    stored(cache, KEYS[0], b"an engine", tmp_path / "made")
    assert cache.fetch(KEYS[0], target) == {"layers": 9}
    assert target.read_bytes() == b"an engine"
    assert cache.fetch(KEYS[1], target) is None
    assert not target.exists(), "what is at the target now is no engine of that key"


@pytest.mark.parametrize("damage", ["engine", "facts", "torn", "gone"])
def test_damage_is_a_miss(tmp_path: Path, damage: str) -> None:
    cache, target = EngineCache(tmp_path / "cache"), tmp_path / "engine"
    stored(cache, KEYS[0], b"an engine", tmp_path / "made")
    engine, facts = (tmp_path / "cache" / f"{KEYS[0]}.{kind}" for kind in ("engine", "json"))
    if damage == "engine":
        engine.write_bytes(b"AN ENGINE")
    elif damage == "facts":
        facts.write_text("[]")
    elif damage == "torn":
        facts.write_text(facts.read_text()[:-9])
    else:
        engine.unlink()
    assert cache.fetch(KEYS[0], target) is None
    assert not target.exists()
    assert not engine.exists() and not facts.exists()
    stored(cache, KEYS[0], b"another", tmp_path / "again")
    assert cache.fetch(KEYS[0], target) == {"layers": 7}


def test_the_one_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache", limit=25)
    for n, key in enumerate(KEYS[:2]):
        stored(cache, key, b"0123456789", tmp_path / "made")
        os.utime(tmp_path / "cache" / f"{key}.json", (n, n))
    cache.fetch(KEYS[0], tmp_path / "engine")
    stored(cache, KEYS[2], b"0123456789", tmp_path / "made")
    assert [cache.fetch(key, tmp_path / "engine") is None for key in KEYS[:3]] == [False, True, False]
    stored(cache, KEYS[3], b"x" * 100, tmp_path / "made")
    assert cache.fetch(KEYS[3], tmp_path / "engine"), "the newest stays, however large"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    cache = EngineCache(tmp_path / "cache")
    stored(cache, KEYS[0], b"an engine", tmp_path / "made")
    cache.learn("t", b"1")
    assert cache.fetch(KEYS[0], tmp_path / "engine") is None
    assert cache.recall("t") == b""


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert EngineCache.default() is None, "tests build for real"
    monkeypatch.setenv("EDGETRIM_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert EngineCache.default().folder == tmp_path / "edgetrim"  # type: ignore[union-attr]


@needs_rtx
def test_an_unchanged_build_is_not_done_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(decoder(tmp_path / "lm.onnx"), PROFILES)
    monkeypatch.setattr(trt, "_work", None)  # a build would fail now
    log: list[str] = []
    (tmp_path / "elsewhere").mkdir()
    again = build(decoder(tmp_path / "elsewhere/lm.onnx"), PROFILES, log)
    assert log == [f"lm.onnx: built before, taken from {folder}"]
    assert again.details["cached"] and not first.details["cached"]
    assert replace(again, details={**again.details, "cached": False}) == first
    assert sha256(tmp_path / "elsewhere/out/lm.engine") == first.sha256


@needs_rtx
@pytest.mark.parametrize("change", ["graph", "weights", "shapes", "targets", "option", "builder", "version"])
def test_whatever_matters_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    graph, profiles, options = decoder(tmp_path / "lm.onnx"), PROFILES, {"module": "tensorrt_rtx"}
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="lm.data", size_threshold=0)

    def key() -> str:
        return _engine_cache.key(trt._parts(graph, profiles, trt._options(options)))

    before = key()
    assert key() == before
    if change == "graph":
        model.graph.node[-1].name = "another"
        onnx.save(model, graph, save_as_external_data=True, location="lm.data", size_threshold=0)
    elif change == "weights":
        data = np.fromfile(tmp_path / "lm.data", np.uint8)
        data[DIM] ^= 1
        data.tofile(tmp_path / "lm.data")
    elif change == "shapes":
        profiles = (PROFILES[0], ranges("decode", Range(1, 1, 4), Range(1, 32, 129)))
    elif change == "targets":
        options["compute_capabilities"] = [89]  # type: ignore[assignment]
    elif change == "option":
        options["workspace_mib"] = 64  # type: ignore[assignment]
    elif change == "builder":
        worker = tmp_path / "worker.py"
        worker.write_text("another")
        monkeypatch.setattr("exporter.backends._trt_worker.__file__", str(worker))
    else:
        monkeypatch.setattr("tensorrt_rtx.__version__", "1.8.0")
    assert key() != before


@needs_rtx
def test_full_tensorrt_keeps_its_timings_and_tells_progress(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX stands in for it, whose interface is the same: the timings' way there and back, not their use."""
    module = tmp_path / "modules/tensorrt"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text("from tensorrt_rtx import *\n__version__ = '10.3.0'\n")
    monkeypatch.syspath_prepend(module.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(module.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)

    def made(name: str) -> EngineRecord:
        lines: list[str] = []
        record = trt.BACKEND.build(
            decoder(tmp_path / name), ("decode",), PROFILES, tmp_path / "out", {"module": "tensorrt"}, lines.append
        )
        assert any(line.startswith("[P] ") and "/" in line for line in lines), "no progress"
        assert not any("iming cache" in line and line.startswith("[E]") for line in lines), lines
        return record

    assert made("lm.onnx").details["version"] == "10.3.0"
    (kept,) = folder.glob("*.timings")
    assert kept.stat().st_size > 100
    kept.write_bytes(b"")
    folder.joinpath(next(folder.glob("*.engine")).name).unlink()
    made("lm.onnx")
    assert kept.stat().st_size > 100
    kept.write_bytes(b"not a timing cache" * 20)
    next(folder.glob("*.engine")).unlink()
    assert made("lm.onnx").bytes, "a damaged one is ignored"
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
