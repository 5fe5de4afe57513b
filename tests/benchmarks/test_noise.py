"""The benchmark of noise runs, and its record is what the gate's simulation reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import noise


def test_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["noise", "--sessions", "2", "--starts", "0", "--rounds", "3", "--results", str(tmp_path)]
    )
    monkeypatch.setattr("benchmarks._common.quiet", lambda: None)
    noise.main()
    (path,) = tmp_path.iterdir()
    entry = json.loads(path.read_text())
    assert len(entry["paired"]) == 2
    for session in entry["paired"]:
        assert {name: set(stages) for name, stages in session.items()} == {n: set(noise.STAGES) for n in "ab"}
        assert all(len(ms) == 3 and min(ms) > 0 for stages in session.values() for ms in stages.values())
