"""The search with made-up models: what wins, what is told, and that a kill changes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import EnvironmentMismatch, ExportError, GateError, LatencyError, UsageError
from exporter.tune.budget import parse_all
from exporter.tune.candidates import Candidate
from exporter.tune.journal import Journal
from exporter.tune.search import Result, Search, Tools

QUESTIONS = 48
P = "board"

# spec → (ms roofline to first token, MiB, share right); a whole answer takes 10 ms more, measured is twice the roofline.
MODELS: dict[str, tuple[float, float, float]] = {
    "unreduced": (100, 1000, 1.0),
    "good:keep=32": (50, 900, 0.98),
    "good:keep=16": (30, 800, 0.90),
    "slow:keep=32": (90, 950, 0.98),
    "bad:keep=32": (50, 900, 0.4),
    "bad:keep=16": (30, 800, 0.2),
    "random:keep=32": (49, 890, 0.6),
    "random:keep=16": (29, 790, 0.5),
}


def role(spec: str) -> Any:
    return "unreduced" if spec == "unreduced" else "control" if spec.startswith("random") else "method"


def candidate(spec: str, profile: str = P) -> Candidate:
    return Candidate(() if spec == "unreduced" else (spec,), profile, role(spec))


class Killed(BaseException):
    pass


class Fake:
    """Tools whose answers are tables. Counts what was asked; `own`: whether the profile's engines run here."""

    def __init__(self, models: dict[str, tuple[float, float, float]], own: bool = True, peaks: bool = True) -> None:
        self.models, self.own, self.peaks = models, own, peaks
        self.asked: list[tuple[str, int, int]] = []
        self.broken: dict[str, str] = {}

    def tools(self) -> Tools:
        return Tools(self._each(self.cost), self.ask, self._each(self.finish), self.times)

    @staticmethod
    def _each(one: Callable[[Candidate], Any]) -> Callable[[Sequence[Candidate]], Iterable[tuple[int, Any]]]:
        return lambda found: ((i, one(c)) for i, c in reversed(list(enumerate(found))))  # in no order, as Ray does

    def cost(self, c: Candidate) -> Any:
        ms, mib, _ = self.models[c.spec]
        known = {"ttft_ms": ms, "latency_ms": ms + 10} if self.peaks else {"ttft_ms": None, "latency_ms": None}
        kept = int(c.spec.partition("=")[2] or 64)
        return {"tokens": 64, "kept": kept, "memory_mib": mib, "gflop": ms / 10, "refused": "", **known}

    def scores(self, c: Candidate, start: int, stop: int) -> list[float]:
        """Wrong answers are spread evenly."""
        share = self.models[c.spec][2]
        return [float(int((q + 1) * share) > int(q * share)) for q in range(start, stop)]

    def ask(self, found: Sequence[Candidate], start: int, stop: int) -> Iterable[tuple[int, Any]]:
        for i, c in enumerate(found):
            self.asked.append((c.spec, start, stop))
            yield i, self.scores(c, start, stop)

    def finish(self, c: Candidate) -> Any:
        if c.spec in self.broken:
            return {"left_out": self.broken[c.spec]}
        return {"scores": self.scores(c, 0, QUESTIONS), "where": "made up", "own": self.own}

    def times(self, found: Sequence[Candidate]) -> Any:
        return [{"ttft": 2 * self.models[c.spec][0], "decode": 1.0} for c in found]


def search(
    path: Path, fake: Fake, *budgets: str, specs: Sequence[str] = (), profiles: Sequence[str] = (P,), finalists: int = 2
) -> Result:
    found = [candidate(spec, p) for p in profiles for spec in specs or fake.models]
    return Search(
        found, (), parse_all(budgets), QUESTIONS, finalists, dict.fromkeys(profiles, 11), fake.tools(),
        Journal(path / "tune.jsonl", {"made from": "these"}),
    ).run()  # fmt: skip


def won(result: Result) -> str | None:
    return None if result.winner is None else result.entries[result.winner].candidate.spec


@pytest.mark.parametrize(
    ("budgets", "winner"),
    [
        (["quality_drop=5"], "good:keep=32"),  # the fastest within it
        (["quality_drop=15"], "good:keep=16"),
        (["latency=130"], "good:keep=32"),  # the best within it: 2 × 50 + 10 × 1 ms
        (["ttft=60"], "good:keep=16"),
        (["memory=850"], "good:keep=16"),
        (["latency=1000"], "unreduced"),
    ],
)
def test_winner(tmp_path: Path, budgets: list[str], winner: str) -> None:
    assert won(search(tmp_path, Fake(MODELS), *budgets, finalists=3)) == winner


def test_a_roofline_above_the_budget_is_out_before_a_question_is_asked(tmp_path: Path) -> None:
    fake = Fake(MODELS)
    result = search(tmp_path, fake, "ttft=60")
    assert "slow:keep=32" not in {spec for spec, _, _ in fake.asked}
    out = {e.candidate.spec: e.out for e in result.entries}
    assert out["slow:keep=32"] == "needs at least 90 ms, the budget is ttft ≤ 60 ms"
    assert result.time == "ttft" and result.basis == "measured"


def test_halving_asks_the_good_ones_more_and_nobody_twice(tmp_path: Path) -> None:
    fake = Fake(MODELS)
    search(tmp_path, fake, "latency=1000", finalists=1)
    asked = {spec: [(a, b) for s, a, b in fake.asked if s == spec] for spec in MODELS}
    assert asked["good:keep=32"] == [(0, 16), (16, QUESTIONS)] and asked["bad:keep=32"] == [(0, 16)]
    assert asked["random:keep=16"] == asked["unreduced"]  # controls stay to the end
    for spec, parts in asked.items():
        assert [a for a, _ in parts] == [0, *(b for _, b in parts[:-1])], spec


def test_controls_never_win_and_are_named_if_they_answer_as_well(tmp_path: Path) -> None:
    models = {**MODELS, "random:keep=16": (29, 790, 1.0)}
    result = search(tmp_path, Fake(models), "ttft=70")
    assert won(result) == "good:keep=16"
    (said,) = (w for w in result.warnings if "control" in w)
    assert "random:keep=16 answers no worse with 16 tokens than good:keep=16 with 16" in said
    (tmp_path / "other").mkdir()
    result = search(tmp_path / "other", Fake(MODELS), "ttft=70")
    assert won(result) == "good:keep=16" and not any("control" in w for w in result.warnings)


def test_what_does_not_run_here_is_judged_by_its_roofline_and_says_so(tmp_path: Path) -> None:
    result = search(tmp_path, Fake(MODELS, own=False), "latency=70")
    assert result.basis == "roofline" and won(result) == "good:keep=32"
    assert any("compared with a roofline only, a lower bound: board does not run here" in w for w in result.warnings)


def test_without_peaks_operations_stand_for_time_until_it_is_measured(tmp_path: Path) -> None:
    result = search(tmp_path, Fake(MODELS, peaks=False), "latency=75")
    assert result.basis == "measured" and won(result) == "good:keep=16"  # 2 × 30 + 10 × 1 ms; 2 × 50 + 10 is too much
    blind = Fake(MODELS, own=False, peaks=False)
    (tmp_path / "b").mkdir()
    result = search(tmp_path / "b", blind, "latency=75")
    assert result.basis == "operations" and any("not checked" in w for w in result.warnings)


def test_a_finalist_that_cannot_be_exported_is_out_with_its_reason(tmp_path: Path) -> None:
    fake = Fake(MODELS)
    fake.broken = {"good:keep=32": "the target would refuse it"}
    result = search(tmp_path, fake, "quality_drop=15")
    assert won(result) == "good:keep=16"
    assert {e.candidate.spec: e.out for e in result.entries}["good:keep=32"] == "the target would refuse it"


@pytest.mark.parametrize(
    ("budgets", "error", "said"),
    [
        (["memory=10"], EnvironmentMismatch, "memory ≤ 10 MiB: the best has 790"),
        (["ttft=59"], LatencyError, "ttft ≤ 59 ms: the best has 60 ms"),
        (["quality_drop=0.5", "ttft=61"], GateError, "quality_drop ≤ 0.5 points"),
    ],
)
def test_nothing_within_the_budget(tmp_path: Path, budgets: list[str], error: type[ExportError], said: str) -> None:
    result = search(tmp_path, Fake(MODELS), *budgets)
    assert result.winner is None
    with pytest.raises(error, match=re.escape(said)):
        result.raise_without_winner()


def test_profiles_are_halved_apart(tmp_path: Path) -> None:
    """In PyTorch the precision does not show: were they halved together, the cheaper one would drive out the other."""
    fake = Fake(MODELS)
    result = search(tmp_path, fake, "quality_drop=15", profiles=("board", "other"), finalists=1)
    assert {e.candidate.profile for e in result.entries if e.engine and e.candidate.role == "method"} == {
        "board",
        "other",
    }


def test_a_kill_at_any_line_of_the_journal_changes_nothing(tmp_path: Path) -> None:
    def outcome(path: Path) -> str:
        result = search(path, Fake(MODELS), "quality_drop=15")
        return repr(result)

    expected = outcome(tmp_path)
    lines = (tmp_path / "tune.jsonl").read_bytes().splitlines(keepends=True)
    kinds = [json.loads(line)["key"].split()[0] for line in lines[1:]]
    assert set(kinds) == {"cost", "scores", "rung", "final", "times"}
    for number in range(1, len(lines) + 1):
        for half in (b"", lines[number][: len(lines[number]) // 2] if number < len(lines) else b""):
            (tmp_path / "tune.jsonl").write_bytes(b"".join(lines[:number]) + half)
            assert outcome(tmp_path) == expected, f"after line {number}"
            found = [json.loads(line) for line in (tmp_path / "tune.jsonl").read_text().splitlines()]
            assert {e["key"]: e["value"] for e in found[1:]} == {
                e["key"]: e["value"] for e in map(json.loads, lines[1:])
            }


def test_what_the_journal_knows_is_not_asked_again(tmp_path: Path) -> None:
    search(tmp_path, Fake(MODELS), "quality_drop=15")
    again = Fake(MODELS)
    search(tmp_path, again, "quality_drop=15")
    assert again.asked == []


def test_a_journal_of_another_search_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "tune.jsonl"
    Journal(path, {"checkpoint": "a", "questions": "b"}).add("x", 1)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="of another search: checkpoint, timing differ"):
        Journal(path, {"checkpoint": "c", "questions": "b", "timing": 1})
    assert path.read_bytes() == before
    for damaged in (b"", b"no JSON\n", b"[1]\n", b'{"other": 1}\n'):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="not the journal of a search"):
            Journal(path, {"checkpoint": "a"})


def test_changed_is_told_after_every_rung(tmp_path: Path) -> None:
    told: list[Result] = []
    fake = Fake(MODELS)
    Search(
        [candidate(s) for s in MODELS], (), parse_all(("latency=1000",)), QUESTIONS, 1, {P: 11}, fake.tools(),
        Journal(tmp_path / "tune.jsonl", {}), changed=told.append,
    ).run()  # fmt: skip
    assert len(told) >= 3 and told[0].winner is None and told[-1].winner is not None
