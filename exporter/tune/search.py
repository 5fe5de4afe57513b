"""The search: rung 0 the cost model, then halving on answers in PyTorch, then the finalists exported, asked and timed.

Nothing here knows a model: `Tools` does. What was found out is in the journal before it is used, and what is decided follows from
it alone, so a search that was killed ends as it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from exporter.errors import ExportError
from exporter.stages.validate import points_lost
from exporter.tune import halving
from exporter.tune.budget import Budget
from exporter.tune.candidates import Candidate, LeftOut
from exporter.tune.found import Cost, Finished, Refused, Scores, Timings, check_count, check_scores
from exporter.tune.front import front
from exporter.tune.journal import Journal
from exporter.tune.survivors import Standing, survivors

T = TypeVar("T")
Log = Callable[[str], None]
Basis = Literal["measured", "roofline", "operations"]
"""What the time of an entry is: measured here, a lower bound, or, where neither is known, operations to the first token."""
UNITS: dict[Basis, str] = {"measured": "ms", "roofline": "ms, roofline", "operations": "GFLOP to first token"}


@dataclass(frozen=True)
class Tools:
    """What a search asks; each answers many at once, yields (place, result) as they come, as JSON of what `found` has.

    cost: of candidates. ask: candidates, first and last question. finish: finalists. times: finalists that run here, all in one go.
    """

    cost: Callable[[Sequence[Candidate]], Iterable[tuple[int, Any]]]
    ask: Callable[[Sequence[Candidate], int, int], Iterable[tuple[int, Any]]]
    finish: Callable[[Sequence[Candidate]], Iterable[tuple[int, Any]]]
    times: Callable[[Sequence[Candidate]], Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class Timed:
    """Milliseconds to the first token and of a whole answer."""

    ttft_ms: float
    latency_ms: float


@dataclass(frozen=True)
class Entry:
    """A candidate with all that is known of it.

    out: why it is no longer in the search; rung: the last one it took part in, 0 is the cost model. gflop: to the first token.
    roofline, measured: None where not known. scores: in PyTorch; engine: of the exported model, all questions; drop, error: points
    lost against the unreduced model on the same questions, and half of the 95 % interval of that; where: what answered.
    """

    candidate: Candidate
    out: str = ""
    rung: int = 0
    tokens: int = 0
    kept: int = 0
    gflop: float = 0.0
    memory_mib: float = 0.0
    roofline: Timed | None = None
    measured: Timed | None = None
    scores: tuple[float, ...] = ()
    engine: tuple[float, ...] = ()
    drop: float | None = None
    error: float | None = None
    where: str = ""

    @property
    def percent(self) -> float | None:
        """Right answers, of the exported model if it was asked."""
        found = self.engine or self.scores
        return 100 * sum(found) / len(found) if found else None

    def time(self, basis: Basis, name: str) -> float:
        """`name`: ttft or latency; of operations there is one figure only."""
        if basis == "operations":
            return self.gflop
        found = self.measured if basis == "measured" else self.roofline
        assert found is not None
        return found.ttft_ms if name == "ttft" else found.latency_ms


@dataclass(frozen=True)
class Result:
    """basis, time: what the front's time is, and whether ttft or latency. front: places of entries. winner: a place, or None.
    warnings: what has to be known about the winner."""

    entries: tuple[Entry, ...]
    left_out: tuple[LeftOut, ...]
    rungs: Mapping[str, tuple[halving.Rung, ...]]
    budgets: tuple[Budget, ...]
    basis: Basis
    time: str
    front: tuple[int, ...]
    winner: int | None
    warnings: tuple[str, ...] = ()

    def raise_without_winner(self) -> None:
        """Raises the error of the budget that nobody is within, else ExportError."""
        if self.winner is not None:
            return
        able = [e for e in self.entries if e.candidate.role != "control"]
        finished = [e for e in able if e.engine]
        for budget in self.budgets:
            met = [_figure(e, budget.name) for e in finished or able]
            best = min((m for m in met if m is not None), default=None)
            if best is not None and best > budget.most:
                unit = budget.kind.unit
                raise budget.kind.error(
                    f"Nothing is within {budget.words}: the best has {best:.4g} {unit}. Allow more."
                )
        raise ExportError(
            f"No candidate is within {' and '.join(b.words for b in self.budgets)} at once. Allow more of one, or try other "
            "methods, keep ratios or profiles."
        )


@dataclass
class Search:
    """One search. `changed` is told after every rung what is known."""

    candidates: Sequence[Candidate]
    left_out: Sequence[LeftOut]
    budgets: tuple[Budget, ...]
    questions: int
    finalists: int
    answer_tokens: Mapping[str, int]
    tools: Tools
    journal: Journal
    log: Log = lambda text: None
    changed: Callable[[Result], None] = lambda result: None
    entries: list[Entry] = field(default_factory=list)

    def run(self) -> Result:
        """All rungs. Raises ExportError if the unreduced model cannot be had, and what `Tools` raise."""
        self.entries = [Entry(c) for c in self.candidates]
        self._rung_0()
        profiles = list(dict.fromkeys(c.profile for c in self.candidates))
        # A profile is halved by itself: in PyTorch precision does not show, so only costs would tell two of them apart.
        alone = (halving.Rung(0, self.questions, 0),)
        rungs = {p: halving.schedule(len(self._in(p)), self.questions, self.finalists) or alone for p in profiles}
        for number in range(max(map(len, rungs.values()), default=0)):
            for profile in profiles:
                if number < len(rungs[profile]):
                    self._halve(profile, number + 1, rungs[profile][number])
            self.changed(self._result(rungs))
        self._last(1 + max(map(len, rungs.values()), default=0))
        result = self._result(rungs)
        self.changed(result)
        return result

    def _in(self, profile: str) -> list[int]:
        """Methods that are still searched."""
        return [
            i for i, e in enumerate(self.entries)
            if e.candidate.profile == profile and e.candidate.role == "method" and not e.out
        ]  # fmt: skip

    def _beside(self, profile: str) -> list[int]:
        """The unreduced model, then the controls: always in, whatever they cost, as long as they can be asked."""
        bare, *controls = [
            i for role in ("unreduced", "control") for i, e in enumerate(self.entries)
            if e.candidate.profile == profile and e.candidate.role == role
        ]  # fmt: skip
        return [bare, *(i for i in controls if len(self.entries[i].scores) == len(self.entries[bare].scores))]

    def _all(
        self, rung: str, places: Sequence[int], ask: Callable[[Sequence[Candidate]], Iterable[tuple[int, Any]]],
        kind: type[T], check: Callable[[T], None] = lambda value: None,
    ) -> list[T | Refused]:  # fmt: skip
        """What the journal knows, and what it does not. kind, check: see `Journal.read`."""
        keys = [f"{rung} {self.entries[i].candidate.key}" for i in places]
        missing = [n for n, key in enumerate(keys) if key not in self.journal.known]
        done = len(keys) - len(missing)
        for place, value in ask([self.entries[places[n]].candidate for n in missing]) if missing else ():
            self.journal.add(keys[missing[place]], value)
            done += 1
            self.log(f"{done} of {len(keys)}: {self.entries[places[missing[place]]].candidate.spec}")
        found: list[T | Refused] = []
        for key in keys:
            value = self.journal.read(key, kind, check)
            found.append(value)
        return found

    def _put(self, place: int, **known: Any) -> None:
        self.entries[place] = replace(self.entries[place], **known)

    def _rung_0(self) -> None:
        """Costs. Rooflines are lower bounds: what is above a budget here is above it."""
        everything = range(len(self.entries))
        for i, found in zip(everything, self._all("cost", everything, self.tools.cost, Cost), strict=True):
            if isinstance(found, Refused):
                self._put(i, out=found.left_out)
                continue
            known = (
                None if found.ttft_ms is None or found.latency_ms is None else Timed(found.ttft_ms, found.latency_ms)
            )
            self._put(
                i, tokens=found.tokens, kept=found.kept, gflop=found.gflop, memory_mib=found.memory_mib, roofline=known,
                out=found.refused,
            )  # fmt: skip
            over = [
                b for b in self.budgets if b.name != "quality_drop" and (_figure(self.entries[i], b.name) or 0) > b.most
            ]
            if over and not found.refused:
                told = _figure(self.entries[i], over[0].name) or 0.0
                least = "" if over[0].name == "memory" else "at least "
                self._put(i, out=f"needs {least}{told:.4g} {over[0].kind.unit}, the budget is {over[0].words}")

    def _halve(self, profile: str, number: int, rung: halving.Rung) -> None:
        places = [*self._beside(profile), *self._in(profile)]
        asked = len(self.entries[places[0]].scores)
        self.log(f"rung {number}: {len(places)} candidates, {rung.questions} questions")
        told: list[Scores | Refused] = [() for _ in places]
        if rung.questions > asked:
            told = self._all(
                f"scores {asked}:{rung.questions}", places, lambda c: self.tools.ask(c, asked, rung.questions),
                Scores, lambda scores: check_scores(scores, rung.questions - asked),
            )  # fmt: skip
        for i, scores in zip(places, told, strict=True):
            if isinstance(scores, Refused):
                if self.entries[i].candidate.role == "unreduced":
                    raise ExportError(f"The unreduced model cannot be asked: {scores.left_out}")
                self._put(i, out=scores.left_out, rung=number)
                continue
            self._put(i, scores=(*self.entries[i].scores, *scores), rung=number)
        full = self.entries[places[0]].scores
        for i in places:
            if len(self.entries[i].scores) == len(full):
                drop, error = points_lost(full, self.entries[i].scores)
                self._put(i, drop=drop, error=error)
        most = next((b for b in self.budgets if b.name == "quality_drop"), None)
        for i in self._in(profile):
            drop, error = self.entries[i].drop or 0.0, self.entries[i].error or 0.0
            if most is not None and drop - error > most.most:
                self._put(i, out=f"loses {drop:.1f} points (± {error:.1f}), the budget is {most.words}")
        left = self._in(profile)
        basis, name = self._basis(left), self._time_name
        known = [
            Standing(self.entries[i].time(basis, name), self.entries[i].memory_mib, self.entries[i].drop or 0.0)
            for i in left
        ]
        going = {left[k] for k in survivors(known, None if most is None else most.most, rung.survive)}
        for i in left:
            if i not in going:
                self._put(i, out=f"not among the {rung.survive} of rung {number} that went on")
        decided = sorted(self.entries[i].candidate.spec for i in going)
        if self.journal.known.get(key := f"rung {number} {profile}") != decided:  # for people to read
            self.journal.add(key, decided)

    def _last(self, number: int) -> None:
        """The finalists and the unreduced model of each profile, exported, asked everything, and timed where that means something."""
        places = [
            i for i, e in enumerate(self.entries) if e.candidate.role == "unreduced" or (e.candidate.role == "method" and not e.out)
        ]  # fmt: skip
        # A model that does not fit the device unreduced is no finalist; its answers in PyTorch are compared with all the same.
        places = [i for i in places if not self.entries[i].out]
        self.log(f"rung {number}: {len(places)} exported")
        timed = []
        finished = self._all(
            "final", places, self.tools.finish, Finished, lambda found: check_scores(found.scores, self.questions)
        )
        for i, found in zip(places, finished, strict=True):
            if isinstance(found, Refused):
                self._put(i, out=found.left_out, rung=number)
                continue
            drop, error = points_lost(self._full(self.entries[i].candidate.profile), found.scores)
            self._put(i, engine=found.scores, drop=drop, error=error, where=found.where, rung=number)
            if found.own:
                timed.append(i)
        if not timed:
            return
        key = "times " + ", ".join(self.entries[i].candidate.key for i in timed)
        if key not in self.journal.known:
            self.log(f"timing {len(timed)} in turn")
            self.journal.add(key, list(self.tools.times([self.entries[i].candidate for i in timed])))
        times = self.journal.read(key, tuple[Timings, ...], lambda found: check_count(found, len(timed), "times"))
        assert not isinstance(times, Refused), "a list has no reason"
        for i, taken in zip(timed, times, strict=True):
            steps = self.answer_tokens[self.entries[i].candidate.profile] - 1
            self._put(i, measured=Timed(taken.ttft, taken.ttft + steps * taken.decode))

    def _full(self, profile: str) -> tuple[float, ...]:
        return next(
            e.scores for e in self.entries if e.candidate.profile == profile and e.candidate.role == "unreduced"
        )

    @property
    def _time_name(self) -> str:
        return "ttft" if any(b.name == "ttft" for b in self.budgets) else "latency"

    def _basis(self, places: Sequence[int]) -> Basis:
        """The best figure that all of them have: different ones are never compared."""
        if places and all(self.entries[i].measured for i in places):
            return "measured"
        return "roofline" if places and all(self.entries[i].roofline for i in places) else "operations"

    def _result(self, rungs: Mapping[str, tuple[halving.Rung, ...]]) -> Result:
        finished = [i for i, e in enumerate(self.entries) if e.engine and not e.out]
        basis, name = self._basis(finished), self._time_name
        points = [
            (self.entries[i].time(basis, name), self.entries[i].memory_mib, self.entries[i].drop or 0.0)
            for i in finished
        ]
        best = tuple(finished[k] for k in front(points))
        winner = self._winner(finished, basis, name)
        warnings = () if winner is None else tuple(self._warnings(winner, basis))
        return Result(
            tuple(self.entries), tuple(self.left_out), rungs, self.budgets, basis, name, best, winner, warnings
        )

    def _winner(self, finished: Sequence[int], basis: Basis, name: str) -> int | None:
        """Of those within all budgets the fastest, if accuracy has a budget, else the one that answers best."""
        within = [i for i in finished if all((_figure(self.entries[i], b.name) or 0.0) <= b.most for b in self.budgets)]
        fastest = any(b.name == "quality_drop" for b in self.budgets)

        def order(i: int) -> tuple[float, float, float, int]:
            e = self.entries[i]
            time, drop = e.time(basis, name), e.drop or 0.0
            return (*((time, drop) if fastest else (drop, time)), e.memory_mib, i)

        return min(within, key=order, default=None)

    def _warnings(self, winner: int, basis: Basis) -> Iterable[str]:
        won = self.entries[winner]
        if won.candidate.role == "unreduced":
            yield "The unreduced model wins: no reduction is needed for this budget, or none that was tried brings anything."
        if basis == "operations":
            yield (
                "Neither a measured time nor a roofline is known of all finalists, so they are compared by operations to the first "
                "token, which say nothing of devices. Search for one profile at a time."
            )
        timed = [b.words for b in self.budgets if b.name in ("latency", "ttft")]
        if timed and won.measured is None:
            bound = (
                "compared with a roofline only, a lower bound"
                if won.roofline
                else "not checked: nothing is known of its time"
            )
            yield f"{' and '.join(timed)} was {bound}: {won.candidate.profile} does not run here. Time it on the device."
        most = next((b for b in self.budgets if b.name == "quality_drop"), None)
        if most is not None and won.drop is not None and won.error is not None and won.drop + won.error > most.most:
            yield (
                f"The winner loses {won.drop:.1f} points (± {won.error:.1f}), which is not surely within {most.words}: ask more "
                "questions."
            )
        if won.candidate.role == "method":
            for e in self.entries:
                equal = (
                    e.candidate.role == "control"
                    and e.candidate.profile == won.candidate.profile
                    and e.kept <= won.kept
                )
                if equal and len(e.scores) == len(won.scores) and sum(e.scores) >= sum(won.scores):
                    yield (
                        f"The control {e.candidate.spec} answers no worse with {e.kept} tokens than {won.candidate.spec} with "
                        f"{won.kept} ({100 * sum(e.scores) / len(e.scores):.1f} and "
                        f"{100 * sum(won.scores) / len(won.scores):.1f} % right in PyTorch): the method brings nothing here."
                    )


def _figure(entry: Entry, name: str) -> float | None:
    """What a budget of this name is about; None where it is not known."""
    if name == "memory":
        return entry.memory_mib
    if name == "quality_drop":
        return entry.drop
    found = entry.measured or entry.roofline
    return None if found is None else (found.ttft_ms if name == "ttft" else found.latency_ms)
