"""Layers and their times: from a profile written by hand, and from a session's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.backends import _ort_profile
from exporter.backends._contract import Layer
from exporter.backends.ort import BACKEND
from exporter.errors import ExportError
from tests.backends.test_ort import cache


def node(name: str, index: int, ts: int, us: int, shape: Any = ()) -> dict[str, Any]:
    args = {"op_name": name[-3:], "node_index": str(index), "provider": "CPU", "output_type_shape": shape}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": us, "args": args}


def test_a_round_is_the_median_of_each_call_over_the_rounds_but_the_first(tmp_path: Path) -> None:
    """Two nodes, one of them called twice a round; 900 µs are another process's."""
    rounds = [(700, 700, 700), (10, 1, 5), (30, 900, 6), (20, 3, 7)]
    events = [{"cat": "Session", "name": "model_run", "ts": 0, "dur": 5000, "args": {}}]
    for i, (first, again, other) in enumerate(rounds):
        at = 1000 * i
        events += [node("m/Add", 4, at, first, [{"float": [1, 2]}]), node("Mul", 7, at + 1, other), node("m/Add", 4, at + 2, again)]  # fmt: skip
    events.append({"cat": "Node", "name": "m/Add_fence_before", "ts": 1, "dur": 9, "args": {}})
    (tmp_path / "p.json").write_text(json.dumps(events[::-1]))
    assert _ort_profile.layers(tmp_path / "p.json", 4) == [
        Layer("m/Add", "Add", ("m",), "float [1, 2]", "CPU", pytest.approx((20 + 3) / 1e3)),
        Layer("Mul", "Mul", (), "", "CPU", pytest.approx(6 / 1e3)),
    ]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"cat": "Node"}]', json.dumps([node("Add", 0, 0, 1)] * 3)])
def test_another_form_is_told_in_words(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ExportError, match="form that is not known"):
        _ort_profile.layers(tmp_path / "p.json", 2)


def test_a_runner_that_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    graph = cache(tmp_path / "g.onnx")
    feeds = {"new": np.ones((1, 2, 4), np.float32), "past": np.ones((1, 3, 4), np.float32)}
    with BACKEND.runner(graph, threads=1, profiled=True) as runner:
        for _ in range(2):
            runner.run(feeds)
        found = runner.layers(2)
        assert {(layer.kind, layer.output) for layer in found} == {("Concat", "float [1, 5, 4]"), ("MatMul", "float [1, 2, 3]")}  # fmt: skip
        assert all(layer.ms is not None and 0 <= layer.ms < 1000 for layer in found)
    with BACKEND.runner(graph, threads=1, profiled=True) as runner:  # and nobody asks
        runner.run(feeds)
    with pytest.raises(ExportError), BACKEND.runner(tmp_path / "none.onnx", profiled=True):
        pass
    with BACKEND.runner(graph, threads=1) as runner:
        runner.run(feeds)
        assert runner.layers() == ()
    assert [p.name for p in tmp_path.iterdir()] == ["g.onnx"]
