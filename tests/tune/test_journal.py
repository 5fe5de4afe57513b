"""The journal of a search: what another hand wrote into it is refused by its line, or asked again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import UsageError
from exporter.tune.found import Cost, Finished, Refused, Scores, Timings, check_scores
from exporter.tune.journal import Journal
from tests.tune.test_search import MODELS, Fake, search

COST = {
    "tokens": 64, "kept": 32, "memory_mib": 900.0, "gflop": 5.0, "ttft_ms": 50, "latency_ms": 60.5, "refused": "",
}  # fmt: skip


def read(path: Path, kind: Any, value: Any, **how: Any) -> Any:
    """As the third line of a journal that was written before."""
    Journal(path, {}).add("other", 1)
    with path.open("a") as file:
        file.write(json.dumps({"key": "x", "value": value}) + "\n")
    return Journal(path, {}).read("x", kind, **how)


def test_what_is_whole(tmp_path: Path) -> None:
    assert read(tmp_path / "a", Cost, COST) == Cost(64, 32, 900.0, 5.0, 50, 60.5, "")
    assert read(tmp_path / "b", Cost, {"left_out": "too large"}) == Refused("too large")
    assert read(tmp_path / "c", Scores, [1, 0.5]) == (1, 0.5)
    assert read(tmp_path / "d", tuple[Timings, ...], [{"ttft": 1.5, "decode": 0}]) == (Timings(1.5, 0),)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (Cost, {**COST, "memory_mib": float("nan")}, "memory_mib is nan, expected a finite number from 0 on"),
        (Cost, {**COST, "ttft_ms": float("inf")}, "ttft_ms is inf"),
        (Cost, {**COST, "gflop": -1}, "gflop is -1"),
        (Cost, {**COST, "kept": "32"}, "kept is '32', expected int"),
        (Cost, {**COST, "latency_ms": None}, "known together or not at all"),
        (Cost, {k: v for k, v in COST.items() if k != "gflop"}, "it has no 'gflop'"),
        (Cost, {"left_out": 3}, "left_out is 3, expected str"),
        (Cost, [COST], "expected dict"),
        (Scores, [1, 2], "score 2 is 2, expected 0 to 1"),
        (Scores, [1, float("nan")], "score 2 is nan"),
        (Scores, [1], "there are 1 scores, expected 2"),
        (Scores, "11", "expected list"),
        (Finished, {"scores": [1, 0], "where": "x", "own": 1}, "own is 1, expected bool"),
        (tuple[Timings, ...], [{"ttft": -0.5, "decode": 1}], "ttft is -0.5"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_line(tmp_path: Path, kind: Any, value: Any, said: str) -> None:
    how = {"check": lambda scores: check_scores(scores, 2)} if kind is Scores else {}
    with pytest.raises(UsageError) as e:
        read(tmp_path / "tune.jsonl", kind, value, **how)
    told = str(e.value)
    assert "tune.jsonl: line 3, 'x', is damaged: " in told and said in told and "Remove that line" in told


def test_a_line_of_another_hand_is_refused_and_the_last_one_may_be_half(tmp_path: Path) -> None:
    path = tmp_path / "tune.jsonl"
    Journal(path, {}).add("a", 1)
    whole = path.read_bytes()
    for damaged in (b"no JSON\n", b"[1]\n", b'{"key": "b"}\n', b'{"key": 1, "value": 1}\n', b"\n"):
        path.write_bytes(whole + damaged + b'{"key": "c", "value": 3}\n')
        before = path.read_bytes()
        with pytest.raises(UsageError, match="line 3 is damaged: "):
            Journal(path, {})
        assert path.read_bytes() == before, "what was found behind it is not lost"
    path.write_bytes(whole + b'{"key": "b", "val')
    assert Journal(path, {}).known == {"a": 1}
    assert path.read_bytes() == whole
    path.write_bytes(whole + b'{"key": "b", "value": 2}')  # an editor that ends no line
    assert Journal(path, {}).known == {"a": 1, "b": 2}


@pytest.mark.parametrize("kind", ["cost", "scores", "final", "times"])
def test_a_search_refuses_what_was_written_into_its_journal_and_goes_on_without_the_line(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "tune.jsonl"
    expected = repr(search(tmp_path, Fake(MODELS), "quality_drop=15"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    number = next(i for i, line in enumerate(lines) if line.get("key", "").startswith(f"{kind} "))
    lines[number]["value"] = [-5]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match=rf"line {number + 1}, '{kind} "):
        search(tmp_path, Fake(MODELS), "quality_drop=15")
    path.write_text("".join(json.dumps(line) + "\n" for i, line in enumerate(lines) if i != number))
    assert repr(search(tmp_path, Fake(MODELS), "quality_drop=15")) == expected
