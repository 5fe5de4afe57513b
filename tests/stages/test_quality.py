"""The accuracy gate: what is counted, what got worse, and that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from exporter import pipeline
from exporter.errors import GateError
from exporter.job import EMBEDDED, Job
from exporter.stages import _answers, regressions, validate
from exporter.stages._answers import Answers
from exporter.stages._task import Question
from exporter.stages.validate import Asked, Regression
from exporter.workspace import Workspace
from profiles._schema import Gates

RED = Image.new("RGB", (4, 4), "red")
QUESTIONS = [Question(kind, [RED], f"{n}?", "7") for n, kind in enumerate(["cell", "cell", "count", "count"])]


def asked(variant: str, *scores: float) -> Asked:
    return Asked(variant, f"the {variant}", [f"{s:g}" for s in scores], list(scores))


FOUND = [asked("unreduced", 1, 1, 1, 0.5), asked("reduced", 1, 0, 1, 0.9), asked("engine", 1, 0, 0.2, 1)]


def gates(**changes: float) -> Gates:
    return Gates(0, 0, 0, **{"quality_drop_max": 100.0, **changes})  # type: ignore[arg-type]


def test_scores_are_summed_by_kind() -> None:
    assert FOUND[2].accuracy(QUESTIONS).scores == {"cell": (1.0, 2), "count": (1.2, 2)}
    assert FOUND[2].accuracy(QUESTIONS).percent() == pytest.approx(55)


def test_regressions_and_their_cause() -> None:
    assert validate.regressions(FOUND) == [Regression(1, "reduction"), Regression(2, "precision")]
    assert validate.regressions(FOUND[:2]) == []
    assert validate.regressions([FOUND[0], FOUND[2]]) == [Regression(1, "precision"), Regression(2, "precision")]


def test_gates_are_of_points_on_the_same_questions() -> None:
    """Lost 0, 0, 80, −10 points: 17.5 on average; the standard deviation is 41.9, so ± 1.96 · 41.9 / 2."""
    (met,) = validate.quality_gates(FOUND, gates())
    assert (met.found, met.error) == (pytest.approx(17.5), pytest.approx(41.1, abs=0.05))
    assert met.passed
    both = validate.quality_gates(FOUND, gates(quality_drop_max=10, reduction_drop_max=5))
    assert [g.passed for g in both] == [False, False]
    assert both[0].found == pytest.approx(15)
    assert validate.verdict([], both)[1].startswith(
        "quality: the engine costs, against the same reduction in PyTorch, 17.5"
    )


def test_answers_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "part" / "a.jsonl"
    first = Answers(path)
    first.add({"q1": "seven", "q2": "zwölf\n"})
    with path.open("a") as file:
        file.write('{"question": "q3", "ans')
    second = Answers(path)
    assert second.known == {"q1": "seven", "q2": "zwölf\n"}
    second.add({"q3": "3"})
    assert Answers(path).known == {"q1": "seven", "q2": "zwölf\n", "q3": "3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = Workspace(tmp_path_factory.mktemp("bundle"))
    pipeline.run_export(Job(EMBEDDED, ("uniform:keep=16",), "cpu_fp32"), work)
    return work.folder


class Killed(BaseException):
    """What the test ends a run with."""


def test_a_killed_validation_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, puts = Workspace(folder), list[int]()
    real = validate.Generator.generate

    def counting(self: object, pixels: Sequence[object], *arguments: object, **named: object) -> object:
        puts.append(len(pixels))
        if len(puts) == 3:
            raise Killed
        return real(self, pixels, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(validate, "BATCH", 8)
    monkeypatch.setattr(validate.Generator, "generate", counting)
    with pytest.raises(Killed):
        pipeline.run_validate(work, per_kind=8, threads=1)
    assert sum(puts[:2]) == 16 and (folder / _answers.FOLDER).is_dir()
    told: list[str] = []
    record = pipeline.run_validate(work, per_kind=8, threads=1, log=told.append)
    # Five variants of 16 questions; the first one's are there already.
    assert sum(puts[3:]) == 4 * 16
    assert "asking the reduced, PyTorch FP32: 8 of 16" in told
    assert not (folder / _answers.FOLDER).exists()
    assert {row["variant"] for row in record["quality"]} == {"unreduced", "reduced", "engine", "control"}
    lines = [json.loads(line) for line in (folder / regressions.ANSWERS).read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(16))
    for row in record["quality"]:
        right = sum(line["answers"][row["label"]]["score"] for line in lines)
        assert right == sum(correct for correct, _ in row["scores"].values())
    worse = record["regressions"]
    assert sum(worse["causes"].values()) == len(worse["shown"]) > 0, "16 of 64 tokens, evenly: some digits are lost"
    for shown in worse["shown"]:
        with Image.open(folder / regressions.PICTURES / shown["file"]) as picture:
            assert picture.width <= regressions.SIDE


def test_the_users_questions_and_thresholds(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RED.save(tmp_path / "red.png")
    lines = [{"image": "red.png", "question": f"How many {d}?", "answer": "walrus"} for d in ("sevens", "ones")]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(validate, "compare", lambda *_, **__: [])
    record = pipeline.run_validate(Workspace(folder), tmp_path / "q.jsonl", threads=1)
    assert record["quality"][0]["scores"] == {"custom": (0.0, 2)}
    assert record["regressions"]["causes"] == {}
    monkeypatch.setattr(
        validate, "quality_gates", lambda found, gates: [validate.QualityGate("the reduction costs", 9.0, 1.0, 5.0)]
    )
    with pytest.raises(GateError, match=r"the reduction costs 9\.0 points \(± 1\.0\); at most 5 allowed"):
        pipeline.run_validate(Workspace(folder), tmp_path / "q.jsonl", threads=1)
