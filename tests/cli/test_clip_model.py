"""`--clip-model`: a bundle whose reduction reads the question with CLIP, made, moved and asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Said
from tests.families import tiny as models

Run = Callable[..., Said]
SPEC = "trim:keep=16,text=clip"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP as wide and deep as the embedded model's tower."""
    folder = tmp_path_factory.mktemp("clip")
    models.clip(folder, hidden=128, layers=4)
    return folder


def test_a_bundle_needs_the_checkpoint_no_more(edgetrim: Run, clip: Path, tmp_path: Path) -> None:
    made, moved, gone = tmp_path / "made", tmp_path / "moved", tmp_path / "clip"
    shutil.copytree(clip, gone)
    arguments = ("-r", SPEC, "--clip-model", gone, "-o", made, "--per-kind", "2", "--rounds", "1", "--threads", "1")
    said = edgetrim("run", "embedded", *arguments, "--json")
    assert said.code == 0, said.err
    data = json.loads(said.out)
    assert [e["roles"] for e in data["engines"]] == [["vision"], ["question"], ["reduce"], ["prefill", "decode"]]
    assert {r["stage"] for r in data["validation"]["fidelity"]} >= {"question", "kept tokens"}
    made.rename(moved)
    shutil.rmtree(gone)
    shown = edgetrim("inspect", moved)
    assert shown.code == 0
    assert [line.split()[0] for line in shown.out.splitlines() if line.startswith(" question")] == ["question"] * 3
    answers = edgetrim("chat", moved, "--json")
    assert answers.code == 0, answers.err
    assert json.loads(answers.out)["turns"][0]["timings_ms"]["question_ms"] > 0
    kept = {}
    for question in ("How many sevens are there?", "Which digit is in row 1, column 1?"):
        drawn = edgetrim("visualize", moved, "--question", question, "-o", tmp_path / "drawn", "--json")
        assert drawn.code == 0, drawn.err
        kept[question] = tuple(json.loads(drawn.out)[0]["index"])
    assert len(set(kept.values())) == 2, "the question must matter"


def test_a_conversation(edgetrim: Run, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image is reduced for the first question; the next turns go on from there."""
    assert edgetrim("export", "embedded", "-r", SPEC, "--clip-model", clip, "-o", tmp_path / "x").code == 0
    typed = iter(["How many sevens are there?", "How many ones are there?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    said = edgetrim("chat", tmp_path / "x")
    assert (said.code, len(said.out.splitlines())) == (0, 2)


def test_visualize_a_checkpoint(edgetrim: Run, clip: Path, tmp_path: Path) -> None:
    said = edgetrim("visualize", "-r", SPEC, "--clip-model", clip, "-o", tmp_path, "--json")
    assert said.code == 0, said.err
    assert len(json.loads(said.out)[0]["index"]) == 16


def test_what_does_not_fit(edgetrim: Run, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    models.clip(tmp_path / "other")
    for arguments, message in (
        (("-r", SPEC), "if --clip-model names their CLIP."),
        (("-r", SPEC, "--clip-model", "no such"), "Checkpoint 'no such' is neither a folder nor a hub id"),
        (("-r", SPEC, "--clip-model", "embedded"), "model_type 'llava', expected 'clip'"),
        (("--clip-model", tmp_path / "other"), "is not the CLIP that this model's tower came from"),
    ):
        said = edgetrim("export", "embedded", *arguments, "-o", out)
        assert (said.code, said.out) == (2, "")
        assert message in said.err
        assert not out.exists()
