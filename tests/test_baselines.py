"""Baselines on disk: what is stored is read again, what does not compare is refused in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from exporter import baselines
from exporter.baselines import Baseline, Session, Spread
from exporter.errors import EnvironmentMismatch, UsageError, VerificationError
from exporter.report import history

CONDITIONS = {
    "checkpoint": "llava",
    "reductions": "fastv:keep=64",
    "frames": "1",
    "image": "336×336",
    "driver": "540.4",
}


def session(ms: float) -> Session:
    return Session.now({"ttft": Spread((ms, ms * 1.01, ms * 0.99), ms * 1.2, 64)}, {"load": 0.1})


def stored(folder: Path) -> Path:
    baseline = Baseline("orin", CONDITIONS)
    for bundle, ms in (("a", 10.0), ("a", 10.2), ("b", 8.0)):
        baseline = baseline.with_session(bundle, session(ms))
    return baseline.save(folder)


def test_round_trip(tmp_path: Path) -> None:
    path = stored(tmp_path)
    assert path.parent == tmp_path / "orin"
    found = baselines.load(path)
    assert [(g.bundle, len(g.sessions)) for g in found.generations] == [("a", 2), ("b", 1)]
    assert found.generations[1].sessions[0].stages["ttft"].openings_ms == (8.0, 8.08, 7.92)
    assert found.save(tmp_path).read_bytes() == path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_bundle_that_comes_back_is_a_new_generation(tmp_path: Path) -> None:
    found = baselines.load(stored(tmp_path)).with_session("a", session(10))
    assert [g.bundle for g in found.generations] == ["a", "b", "a"]


def test_find(tmp_path: Path) -> None:
    path = stored(tmp_path)
    assert baselines.find(tmp_path, "orin", dict(reversed(CONDITIONS.items())))[0] == path
    with pytest.raises(EnvironmentMismatch) as refused:
        baselines.find(tmp_path, "orin", {**CONDITIONS, "driver": "550.1", "power mode": "15W"})
    assert "is not comparable: driver 540.4 → 550.1, power mode none → 15W." in str(refused.value)
    with pytest.raises(UsageError, match="no baseline of llava \\(none\\) for profile `orin`"):
        baselines.find(tmp_path, "orin", {**CONDITIONS, "reductions": "none"})
    with pytest.raises(UsageError, match="no baseline"):
        baselines.find(tmp_path / "absent", "orin", CONDITIONS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema": 1', '"schema": 2', "has schema 2; this edgetrim reads 1"),
        ("10.2", "-1", "is no time"),
        ("10.2", "NaN", "is no time"),
        ('"sessions"', '"session"', "KeyError"),
        ("{", "[", "damaged"),
    ],
)
def test_damage_is_said(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = stored(tmp_path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(VerificationError, match=message):
        baselines.load(path)


def test_a_file_of_any_json(tmp_path: Path) -> None:
    for value in (None, 1, [], {}, {"schema": "x"}, {"schema": 1, "profile": 1, "conditions": [], "generations": {}}):
        path = tmp_path / "b.json"
        path.write_text(json.dumps(value))
        with pytest.raises(VerificationError):
            baselines.load(path)


def test_the_page_escapes_and_marks_generations(tmp_path: Path) -> None:
    baseline = baselines.load(stored(tmp_path))
    page = history.render("orin", [replace(baseline, conditions={**CONDITIONS, "checkpoint": "<b>"})])
    assert "<b>: fastv" not in page and "&lt;b&gt;: fastv:keep=64" in page
    assert page.count("<circle") == 3 and page.count('class="here"') == 1
    assert page.count('class="mark s1"') == 1
    assert "<script" not in page
