"""The benchmark of plugins: its sizes are theirs, and without a device it says what it lacks. It needs a GPU to do more."""

from __future__ import annotations

from pathlib import Path

import pytest

import plugins
from benchmarks import plugins as benchmark
from exporter import _discover
from plugins import _library
from plugins._apply import load


def test_every_plugin_has_sizes() -> None:
    assert sorted(benchmark.SIZES) == _discover.names(plugins)
    for name, sizes in benchmark.SIZES.items():
        for _, case in sizes:
            assert list(case.attributes) == list(load(name).attributes)


def test_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(_library.VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(SystemExit, match=r"The library is not built\. cmake -S"):
        benchmark.main([])


def test_an_unknown_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["token_choose"])
    assert "no sizes for token_choose; there are token_select" in capsys.readouterr().err
