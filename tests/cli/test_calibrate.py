"""`edgetrim calibrate`: whole outputs, and what it refuses before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.calibrators import _contract
from exporter.job import Job
from exporter.stages import _task
from tests.conftest import Said

Run = Callable[..., Said]


@pytest.fixture
def lines(tmp_path: Path) -> list[dict[str, object]]:
    """Three questions about cells, whose images are in the folder."""
    found: list[dict[str, object]] = []
    for i, q in enumerate(q for q in _task.for_calibration(1, 6) if q.kind == "cell"):
        q.frames[0].save(tmp_path / f"{i}.png")
        found.append({"image": f"{i}.png", "question": q.question, "answer": q.answer, "box": list(q.boxes[0] or ())})
    return found


def written(folder: Path, lines: list[dict[str, object]]) -> Path:
    path = folder / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_vtw(edgetrim: Run) -> None:
    said = edgetrim("calibrate", "vtw:threshold=100,samples=4", "embedded")
    assert (said.code, said.err) == (0, "")
    rows = said.out.splitlines()
    assert rows[0] == "Visual tokens withdrawn at layer K"
    assert [row.split()[0] for row in rows[4:7]] == ["1", "2", "3"] and rows[4].endswith("chosen")
    assert rows[-2:] == [
        "Mean and largest of 4 questions: nats between the next token and the full model's.",
        "--reduce vtw:k=1",
    ]


def test_sparsemm(edgetrim: Run, tmp_path: Path, lines: list[dict[str, object]]) -> None:
    path, file = written(tmp_path, lines), tmp_path / "heads.json"
    said = edgetrim("calibrate", "sparsemm:keep_ratio=0.5", "embedded", "--questions", path, "-o", file)
    assert (said.code, said.err) == (0, "")
    rows = said.out.splitlines()
    assert rows[0] == "Score of every head" and [row.split()[0] for row in rows[4:8]] == ["0", "1", "2", "3"]
    assert rows[-2].startswith("3 questions; 3 of 3 tokens read in a box")
    spec = f"sparsemm:keep_ratio=0.5,scores={file}"
    assert rows[-1] == f"--reduce {spec}"
    assert Job("embedded", (spec,), "cpu_fp32").plan().steps[0].after == 32
    before = file.read_bytes()
    again = edgetrim("calibrate", "sparsemm:keep_ratio=0.5", "embedded", "--questions", path, "-o", file, "--json")
    data = json.loads(again.out)
    assert data["specs"] == [spec] and data["file"] == str(file) and file.read_bytes() == before
    assert data["heads"].keys() == json.loads(before).keys()


REFUSED = [
    (["vtv"], "Unknown method to calibrate 'vtv'. Did you mean 'vtw'? Known: dyrate, sparsemm, vtw."),
    (["fastv"], "'fastv' has nothing to calibrate. These have: dyrate, sparsemm, vtw."),
    (["vtw:k=3"], "vtw has no knob `k`. Knobs: threshold=0.003, first=none, samples=20."),
    (["vtw:threshold=low"], "`threshold` of vtw takes a number; found 'low'"),
    (["vtw:"], "'vtw:' ends after the colon"),
    (["vtw", "-o", "x"], "vtw writes no file: what it finds is a spec. Leave --output out."),
    (["sparsemm", "-o", "a,b.json"], "a spec cannot name a file with a comma in its path"),
    (["sparsemm", "-o", "."], "Cannot write .: "),
    (["sparsemm", "-o", "/dev/null/x"], "Cannot write /dev/null/x: /dev/null is a file. Choose another --output."),
    (["dyrate:layer=9"], "`layer` must be in 1..3"),
    (["dyrate:rates=1"], "`rates` must be 2 or more"),
    (["dyrate:steps=0"], "must be 1 or more"),
    (["dyrate:state=-1"], "`state` and `cost` 0 or more; found 3, 300, 16, -1 and 0.5."),
    (["sparsemm:keep_ratio=2"], "keep_ratio"),
    (["sparsemm", "--frames", "4"], "The embedded task holds 0 questions; sparsemm needs 1 or more."),
]


@pytest.mark.parametrize(("arguments", "error"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_refusals(
    edgetrim: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    method, *options = arguments
    said = edgetrim("calibrate", method, "embedded", *options)
    assert said.code == 2 and error in said.err and not said.out
    assert not list(tmp_path.iterdir())


def test_questions_that_do_not_do(
    edgetrim: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, object]]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = edgetrim("calibrate", "vtw", "embedded", "--questions", written(tmp_path, lines))
    assert said.code == 2 and "q.jsonl holds 3 questions; vtw needs 20 or more." in said.err
    del lines[1]["box"]
    said = edgetrim("calibrate", "sparsemm", "embedded", "--questions", written(tmp_path, lines))
    assert said.code == 2 and 'question 2 has no "box" (nor "boxes"), as 1 of 3' in said.err
    lines[1]["box"] = [70, 0, 80, 9]
    said = edgetrim("calibrate", "sparsemm", "embedded", "--questions", written(tmp_path, lines))
    assert said.code == 2 and "holds nothing that the model sees" in said.err
    assert not (tmp_path / "sparsemm.json").exists()


def test_another_model_needs_questions_of_its_own(edgetrim: Run) -> None:
    from exporter.embedded import CHECKPOINT

    said = edgetrim("calibrate", "vtw", CHECKPOINT)
    assert said.code == 2 and "Which questions? Pass --questions FILE.jsonl" in said.err


def test_the_page_says_every_knob() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "calibrate.md").read_text()
    for name in _contract.names():
        section = page.split(f"## `{name}`")[1].split("\n## ")[0]
        assert all(f"`{knob.name}`" in section for knob in dataclasses.fields(_contract.parse(name))), name
