"""check: is a bundle slower than another one, or than it was? Measures what `exporter.gate` judges; writes nothing.

A session opens what is compared anew, as where memory lies decides a few percent that no number of rounds averages; it then
times as many rounds as two seconds hold. The order of opening alternates from session to session, the order of running from
round to round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter import gate
from exporter.backends._contract import Array
from exporter.baselines import Generation, Session, Spread
from exporter.bundle import identity
from exporter.device import facts, state
from exporter.engines import open_runners
from exporter.errors import UsageError
from exporter.graphset import GraphSet
from exporter.job import Job
from exporter.stages import bench
from exporter.stages._inputs import synthetic
from exporter.workspace import Workspace
from profiles._schema import Profile

Log = Callable[[str], None]
SESSION_S = 2.0
"""Seconds of rounds in a session; loading the bundle takes as long or longer."""
ROUNDS = range(8, 65)
"""Rounds in a session, at least and at most."""
WARMUP = 2
OPENINGS = 5
"""Sessions of one start that is stored or compared with what is: its number is their median."""
ALWAYS = ("ttft", "decode")
SHARE = 0.02
"""Of the time to first token: a stage with less is shown, but not judged by itself."""

Compared = dict[str, list[tuple[Sequence[float], Sequence[float]]]]
"""Stage → one pair per session: milliseconds of the baseline's rounds, and of the candidate's."""


@dataclass(frozen=True)
class Subject:
    """A folder that is timed. `bundle`: its hash, see `bundle.identity`."""

    folder: Path
    job: Job
    profile: Profile
    graphs: GraphSet
    bundle: str

    @classmethod
    def of(cls, folder: Path) -> Subject:
        """Raises VerificationError if a manifest says otherwise."""
        job = Job.read(Workspace(folder))
        return cls(folder, job, job.loaded_profile(), GraphSet.load(folder / "graphs"), identity(folder))

    def model(self) -> dict[str, str]:
        """Which model it is, in words."""
        image = self.graphs.image
        return {
            "checkpoint": self.job.checkpoint.rstrip("/").rpartition("/")[2],
            "reductions": " + ".join(self.job.reductions) or "none",
            "frames": str(self.job.frames),
            "image": f"{image.height}×{image.width}",
        }


@dataclass(frozen=True)
class Setting:
    """How it is timed. threads: None is the runtime's choice. new_tokens: of every round."""

    threads: int | None = None
    new_tokens: int = 16

    def words(self) -> dict[str, str]:
        threads = "the runtime's choice" if self.threads is None else str(self.threads)
        return {"threads": threads, "tokens a round": str(self.new_tokens)}


@dataclass(frozen=True)
class Stage:
    """One stage, compared. Milliseconds are medians over sessions. finding: None if the stage is too short to be judged."""

    stage: str
    baseline_ms: float
    candidate_ms: float
    finding: gate.Finding | None


@dataclass(frozen=True)
class Check:
    """The result. kind: "paired", or "stored" where the baseline is a file's. limit: slowdown that is allowed, 0.025 is 2.5 %."""

    kind: str
    baseline: str
    executed: str
    limit: float
    sessions: int
    stages: list[Stage]

    @property
    def judged(self) -> list[tuple[str, gate.Finding]]:
        return [(s.stage, s.finding) for s in self.stages if s.finding is not None]

    @property
    def verdict(self) -> gate.Verdict:
        """The worst of the stages'."""
        found: set[gate.Verdict] = {f.verdict for _, f in self.judged}
        worst: tuple[gate.Verdict, ...] = ("slower", "cannot tell")
        return next((v for v in worst if v in found), "not slower")


def against(
    candidate: Subject,
    baseline: Subject,
    setting: Setting,
    most: int,
    apart: bool = False,
    log: Log = lambda text: None,
) -> Check:
    """Time both bundles in turn until all stages are settled, `most` sessions at most.

    Args:
        apart: open one at a time, for devices whose memory does not hold both; the order alternates.
    Raises:
        UsageError: they do not take the same images.
    """
    theirs, ours = baseline.model(), candidate.model()
    if changed := [f"{k} {theirs[k]} → {ours[k]}" for k in ("checkpoint", "frames", "image") if theirs[k] != ours[k]]:
        raise UsageError(f"{candidate.folder} and {baseline.folder} are not comparable: {', '.join(changed)}.")
    limit = candidate.profile.gates.latency_slowdown_max / 100
    found: Compared = {}
    checked = Check("paired", str(baseline.folder), "", limit, 0, [])
    for number in range(most):
        log(_progress(checked, number, most))
        subjects = [("baseline", baseline), ("candidate", candidate)]
        subjects = subjects if number % 2 else subjects[::-1]
        groups = [[s] for s in subjects] if apart else [subjects]
        samples: dict[str, bench.Samples] = {}
        executed: dict[str, str] = {}
        for group in groups:
            timed, ran = _session(group, setting)
            samples, executed = samples | timed, executed | ran
        for stage, rounds in samples["baseline"].items():
            if stage in samples["candidate"]:
                found.setdefault(stage, []).append((rounds, samples["candidate"][stage]))
        stages = judge(found, limit, apart)
        checked = Check("paired", str(baseline.folder), executed["candidate"], limit, number + 1, stages)
        if all(gate.narrow(f, limit) for _, f in checked.judged):
            break
    return checked


def judge(found: Compared, limit: float, apart: bool = False) -> list[Stage]:
    """What the sessions so far say of every stage."""
    times = {
        stage: [float(np.median([np.median(pair[side]) for pair in pairs])) for side in (0, 1)]
        for stage, pairs in found.items()
    }
    judged = judged_stages({stage: before for stage, (before, _) in times.items()})

    def one(theirs: Sequence[float], ours: Sequence[float]) -> float:
        return float(gate.level(ours) - gate.level(theirs) if apart else gate.ratio(theirs, ours))

    return [
        Stage(
            stage, times[stage][0], times[stage][1],
            gate.paired([one(*pair) for pair in pairs], limit, len(judged)) if stage in judged else None,
        )
        for stage, pairs in found.items()
    ]  # fmt: skip


def start(subject: Subject, setting: Setting, log: Log = lambda text: None) -> tuple[Session, str]:
    """Time one bundle by itself: the session that a baseline stores or is compared with; and in words what ran."""
    openings: list[bench.Samples] = []
    for number in range(OPENINGS):
        log(f"opening {number + 1} of {OPENINGS}")
        samples, executed = _session([("bundle", subject)], setting)
        openings.append(samples["bundle"])
    stages = {
        stage: Spread(
            tuple(round(float(np.median(o[stage])), 4) for o in openings),
            round(float(np.percentile([ms for o in openings for ms in o[stage]], 90)), 4),
            len(openings[0][stage]),
        )
        for stage in openings[0]
    }
    return Session.now(stages, state()), executed["bundle"]


def stored(session: Session, generations: Sequence[Generation], limit: float, where: str, executed: str) -> Check:
    """Judge a start against those of the last bundle that is stored; those of earlier ones tell how much starts differ."""
    *earlier, last = generations
    times = {stage: levels for stage in session.stages if (levels := _levels(last, stage))}
    before = {stage: float(np.exp(np.median(levels))) for stage, levels in times.items()}
    judged = judged_stages(before)
    stages = []
    for stage, levels in times.items():
        now, finding = _level(session, stage), None
        if stage in judged:
            others = [found for g in earlier if (found := _levels(g, stage))]
            finding = gate.unpaired(levels, [now], limit, len(judged), others)
        stages.append(Stage(stage, before[stage], float(np.exp(now)), finding))
    return Check("stored", where, executed, limit, len(last.sessions), stages)


def conditions(subject: Subject, setting: Setting, executed: str) -> dict[str, str]:
    """Under which a baseline holds: the model, how it is timed, and where."""
    return {**subject.model(), **setting.words(), "runs": executed, **facts()}


def judged_stages(before: Mapping[str, float]) -> list[str]:
    """Stages that are judged: those with a share in the time to first token, it, and the time per output token."""
    whole = before.get("ttft", 0.0)
    return [stage for stage, ms in before.items() if stage in ALWAYS or ms >= SHARE * whole]


def _level(session: Session, stage: str) -> float:
    return float(gate.level(session.stages[stage].openings_ms))


def _levels(generation: Generation, stage: str) -> list[float]:
    return [_level(session, stage) for session in generation.sessions if stage in session.stages]


def _session(
    subjects: Sequence[tuple[str, Subject]], setting: Setting
) -> tuple[dict[str, bench.Samples], dict[str, str]]:
    """Open in this order, time in turn; samples by name, and in words what ran."""
    with ExitStack() as stack:
        opened: dict[str, bench.Variant] = {}
        executed: dict[str, str] = {}
        side: dict[str, Array] = {}
        inputs: tuple[Array, Sequence[Sequence[int]]] | None = None
        for name, subject in subjects:
            runners = open_runners(subject.folder, subject.profile, setting.threads)
            *parts, executed[name] = stack.enter_context(runners)
            opened[name] = bench.Variant(name, *parts)
            pixels, prompts, sides = synthetic(Workspace(subject.folder), opened[name].graphs, 1)
            inputs, side = (pixels[0], prompts), {**side, **sides[0]}
        assert inputs is not None, "there is something to time"
        variants = [opened[name] for name in sorted(opened)]
        begin = time.perf_counter()
        bench.sample(variants, inputs[0], inputs[1], setting.new_tokens, WARMUP, 0, side=side)
        rounds = rounds_for((time.perf_counter() - begin) / WARMUP)
        return bench.sample(variants, inputs[0], inputs[1], setting.new_tokens, rounds, 0, side=side), executed


def rounds_for(seconds: float) -> int:
    """Rounds of a session whose rounds take so long: even, so that both orders come as often."""
    wanted = min(max(int(SESSION_S / seconds), ROUNDS.start), ROUNDS.stop - 1)
    return wanted + wanted % 2


def _progress(checked: Check, number: int, most: int) -> str:
    open_ = [stage for stage, f in checked.judged if not gate.narrow(f, checked.limit)]
    waits = f", waiting for {', '.join(open_)}" if open_ and number >= gate.FEWEST else ""
    return f"session {number + 1} of {most} at most{waits}"
