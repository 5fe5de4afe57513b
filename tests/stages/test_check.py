"""The latency check around real engines, and around sessions that are made up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter import gate, pipeline
from exporter.baselines import Generation, Session, Spread
from exporter.errors import UsageError, VerificationError
from exporter.job import EMBEDDED, Job
from exporter.stages import bench, check
from exporter.workspace import Workspace

Timed = tuple[dict[str, bench.Samples], dict[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, exported."""
    work = Workspace(tmp_path_factory.mktemp("bundle"))
    pipeline.run_export(Job(EMBEDDED, ("uniform:keep=16",), "cpu_fp32"), work)
    return work.folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ROUNDS", range(2, 3))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("apart", [False, True])
def test_real_engines_are_compared_in_turn(folder: Path, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[list[str]] = []
    real = check._session

    def spy(subjects: Sequence[tuple[str, check.Subject]], setting: check.Setting) -> Timed:
        opened.append([name for name, _ in subjects])
        return real(subjects, setting)

    monkeypatch.setattr(check, "_session", spy)
    subject = check.Subject.of(folder)
    found = check.against(subject, subject, check.Setting(threads=1, new_tokens=2), most=2, apart=apart)
    assert found.sessions == 2 and found.executed == "ONNX Runtime, CPU"
    assert {s.stage for s in found.stages} == {"vision", "reduce", "prefill", "decode", "ttft"}
    assert all(s.baseline_ms > 0 and s.candidate_ms > 0 for s in found.stages)
    assert found.verdict == "cannot tell", "two sessions are too few, whatever they say"
    one, other = ["candidate", "baseline"], ["baseline", "candidate"]
    assert opened == ([[n] for n in (*one, *other)] if apart else [one, other])


@pytest.mark.usefixtures("quick")
def test_a_start(folder: Path) -> None:
    subject = check.Subject.of(folder)
    session, executed = check.start(subject, check.Setting(1, 2))
    assert executed == "ONNX Runtime, CPU"
    assert {len(s.openings_ms) for s in session.stages.values()} == {check.OPENINGS}
    told = check.conditions(subject, check.Setting(1, 2), executed)
    assert (told["checkpoint"], told["reductions"], told["threads"]) == ("embedded", "uniform:keep=16", "1")


def sessions_of(slowdown: Callable[[str, int], float]) -> Callable[..., Timed]:
    """Sessions whose candidate takes `slowdown(stage, session)` times as long, without any noise but that."""
    count = iter(range(1000))
    stages = {"vision": 20.0, "reduce": 0.1, "prefill": 80.0, "decode": 5.0, "ttft": 100.0}

    def session(subjects: object, setting: object) -> Timed:
        n = next(count)
        baseline = {s: [ms] * 8 for s, ms in stages.items()}
        candidate = {s: [ms * slowdown(s, n)] * 8 for s, ms in stages.items()}
        return {"baseline": baseline, "candidate": candidate}, dict.fromkeys(("baseline", "candidate"), "here")

    return session


def test_it_stops_when_all_is_settled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wobble = (0.999, 1.001)
    slow = sessions_of(lambda stage, n: wobble[n % 2] * (1.2 if stage in ("prefill", "reduce") else 1.0))
    monkeypatch.setattr(check, "_session", slow)
    subject = check.Subject.of(folder)
    found = check.against(subject, subject, check.Setting(), most=20)
    assert found.sessions == gate.FEWEST
    verdicts = {s.stage: s.finding and s.finding.verdict for s in found.stages}
    assert verdicts == {
        "vision": "not slower", "reduce": None, "prefill": "slower", "decode": "not slower", "ttft": "not slower",
    }  # fmt: skip
    assert found.verdict == "slower"


def test_it_goes_on_while_one_stage_is_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    noisy = sessions_of(lambda stage, n: float(np.exp(rng.normal(0, 0.2 if stage == "decode" else 0.001))))
    monkeypatch.setattr(check, "_session", noisy)
    subject = check.Subject.of(folder)
    found = check.against(subject, subject, check.Setting(), most=9)
    assert (found.sessions, found.verdict) == (9, "cannot tell")
    assert [stage for stage, f in found.judged if f.verdict == "cannot tell"] == ["decode"]


def test_other_images_do_not_compare(folder: Path) -> None:
    subject = check.Subject.of(folder)
    other = replace(subject, job=replace(subject.job, frames=4, checkpoint="/models/llava"))
    with pytest.raises(UsageError, match="not comparable: checkpoint embedded → llava, frames 1 → 4"):
        check.against(other, subject, check.Setting(), 5)


def test_a_changed_bundle_is_not_timed(folder: Path, tmp_path: Path) -> None:
    work = Workspace(Path(shutil.copytree(folder, tmp_path / "copy")))
    before = check.Subject.of(work.folder).bundle
    pipeline.run_pack(work)
    assert check.Subject.of(work.folder).bundle == before == check.Subject.of(folder).bundle
    with (work.graphs / "reduce.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(VerificationError, match=r"reduce\.onnx"):
        check.Subject.of(work.folder)


def test_against_what_is_stored() -> None:
    def session(ms: float) -> Session:
        return Session.now({s: Spread((ms, ms, ms), ms, 8) for s in ("ttft", "decode")}, {})

    generation = Generation("b", tuple(session(ms) for ms in (10.0, 10.01, 9.99)))
    assert check.stored(session(10.02), [generation], 0.025, "file", "here").verdict == "not slower"
    assert check.stored(session(11.0), [generation], 0.025, "file", "here").verdict == "slower"
    few = Generation("b", generation.sessions[:2])
    assert check.stored(session(11.0), [few], 0.025, "file", "here").verdict == "cannot tell"
    new = Generation("c", (session(12.0),))
    judged = check.stored(session(12.02), [generation, new], 0.025, "file", "here")
    assert (judged.verdict, judged.sessions) == ("not slower", 1), "how starts differ is known from the bundle before"


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 64), (0.1, 20), (0.13, 16), (10, 8)])
def test_rounds_of_a_session(seconds: float, rounds: int) -> None:
    """Two seconds of them, 8 to 64, and even."""
    assert check.rounds_for(seconds) == rounds
