"""validate: two questions, kept apart.

*Fidelity*: is it the same mathematics in the other runtime? Stage by stage against the PyTorch modules on the same input.
*Quality*: does the reduced model still answer right? Task score, beside random and uniform selection at the same count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.backends._contract import Array, Runner
from exporter.graphset import GraphSet
from exporter.plan import Plan, make_plan
from exporter.runtime import images
from exporter.runtime.generate import Generator, Visual
from exporter.runtime.prompt import Prompt
from exporter.runtime.sampling import greedy
from exporter.runtime.sequence import split
from exporter.stages import _answers, _recorded
from exporter.stages._answers import Answers
from exporter.stages._task import Question, kinds
from exporter.workspace import Workspace
from graphs import _spec
from profiles._schema import Gates

Log = Callable[[str], None]
STEPS = 32
"""Greedy tokens compared."""
BATCH = 16
"""Questions asked at once."""
NEW_TOKENS = 32
"""Of an answer, at most."""
RIGHT = 0.5
"""Score from which an answer counts as right, where that is a question of yes or no."""


@dataclass(frozen=True)
class StageFidelity:
    """One stage against PyTorch on the same input. cosine and max_abs over all float outputs, the worst of all samples;
    agreement: fraction of equal entries (kept index, or greedy tokens); gate: the threshold in words; passed: None if none."""

    stage: str
    cosine: float | None = None
    max_abs: float | None = None
    relative: float | None = None
    agreement: float | None = None
    gate: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class Accuracy:
    """Right answers of one variant: kind → (sum of the scores, asked). A score is 0 or 1, or between for some metrics."""

    variant: str
    label: str
    scores: dict[str, tuple[float, int]]

    def percent(self) -> float:
        correct, asked = (sum(x) for x in zip(*self.scores.values(), strict=True))
        return 100 * correct / max(1, asked)


@dataclass(frozen=True)
class QualityGate:
    """A threshold on accuracy. found: points lost. error: half of the 95 % interval of that, in points; the same questions were
    put to both."""

    name: str
    found: float
    error: float
    most: float

    @property
    def passed(self) -> bool:
        return self.found <= self.most

    def words(self) -> str:
        return f"{self.name} {self.found:.1f} points (± {self.error:.1f}); at most {self.most:g} allowed"


@dataclass(frozen=True)
class Asked:
    """One variant's answers and their scores, in the order of the questions."""

    variant: str
    label: str
    answers: list[str]
    scores: list[float]

    def accuracy(self, questions: Sequence[Question]) -> Accuracy:
        totals = dict.fromkeys(kinds(questions), (0.0, 0))
        for value, question in zip(self.scores, questions, strict=True):
            total, count = totals[question.kind]
            totals[question.kind] = total + value, count + 1
        return Accuracy(self.variant, self.label, totals)


@dataclass(frozen=True)
class Regression:
    """A question that the unreduced model answers right and the engine does not. cause: "reduction" if the reduced model in
    PyTorch fails too, else "precision". number: of the question, from 0."""

    number: int
    cause: str


@dataclass(frozen=True)
class Validation:
    """The evidence. `failed`: gates that did not pass, in words."""

    fidelity: list[StageFidelity]
    quality: list[Accuracy]
    failed: list[str]
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    gates: list[QualityGate] = field(default_factory=list)
    regressions: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        gates = [{**asdict(gate), "passed": gate.passed, "words": gate.words()} for gate in self.gates]
        return {**asdict(self), "gates": gates}


def cosine(a: Array, b: Array) -> float:
    """Cosine of two arrays, flattened; 1 for two zero arrays."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm else float(np.array_equal(x, y))


class _Compare:
    """Collects the worst cosine and the largest difference over samples."""

    def __init__(self) -> None:
        self.cosine, self.max_abs, self.relative = 1.0, 0.0, 0.0

    def add(self, found: Array, expected: Array) -> None:
        self.cosine = min(self.cosine, cosine(found, expected))
        difference = float(np.abs(found.astype(np.float64) - expected).max(initial=0))
        self.max_abs = max(self.max_abs, difference)
        self.relative = max(self.relative, difference / max(1e-12, float(np.abs(expected).max(initial=0))))

    def stage(self, name: str) -> StageFidelity:
        return StageFidelity(name, self.cosine, self.max_abs, self.relative)


def compare(
    plan: Plan,
    engine: Mapping[str, Runner],
    graphs: GraphSet,
    table: Array,
    pixels: Sequence[Array],
    prompts: Sequence[Sequence[int]],
    gates: Gates | None,
    steps: int = STEPS,
    sides: Sequence[Mapping[str, Array]] | None = None,
    record: Path | None = None,
) -> list[StageFidelity]:
    """Fidelity of every stage.

    Args:
        engine: opened runners by role. table: the engine's embedding table.
        pixels: samples, each float32 [1, frames, 3, height, width]. prompts: their token ids.
        gates: thresholds, or None to measure only.
        steps: greedy tokens compared at most; what comes behind the reference's end of sequence means nothing.
        sides: per sample what `Generator.reduce` takes beside image and prompt.
        record: where the reference's outputs go, for `compare_recorded`.
    """
    from exporter.stages._reference import reference

    recorder = _recorded.Recorder(Generator(*reference(plan)))
    measured = _Measured(recorder, Generator(engine, graphs, table), engine["vision"].numpy, steps)
    for pixel_values, prompt, side in zip(pixels, prompts, sides or [{}] * len(prompts), strict=True):
        recorder.begin(pixel_values, prompt, side)
        measured.add(pixel_values, prompt, side)
        recorder.end()
    if record is not None:
        _recorded.save(recorder.samples, record)
    return measured.stages(gates)


def compare_recorded(
    samples: Sequence[_recorded.Sample],
    engine: Mapping[str, Runner],
    graphs: GraphSet,
    table: Array,
    gates: Gates | None,
    steps: int = STEPS,
) -> list[StageFidelity]:
    """As `compare`, with what the reference made of these samples where it was at hand."""
    generator = Generator(engine, graphs, table)
    measured = _Measured(_recorded.Recording(samples), generator, engine["vision"].numpy, steps)
    for sample in samples:
        measured.add(sample["pixel_values"], sample["prompt"].tolist(), _recorded.group(sample, "side"))
    return measured.stages(gates)


class _Measured:
    """Runs samples through the reference and the engine and keeps the worst of what is compared."""

    def __init__(
        self, reference: _recorded.Reference, engine: Generator, host: Callable[[Any], Array], steps: int
    ) -> None:
        """`host` brings the engine's signals to the host."""
        self.reference, self.engine, self.host, self.steps = reference, engine, host, steps
        self.vision, self.reduce, self.prefill, self.decode = _Compare(), _Compare(), _Compare(), _Compare()
        self.question = _Compare()
        self.index: list[float] = []
        self.kept: list[float] = []
        self.kept_inside: list[float] = []
        self.tokens: list[float] = []

    def add(self, pixel_values: Array, prompt: Sequence[int], side: Mapping[str, Array]) -> None:
        """Compare every stage on the reference's own input to it, then the whole chain."""
        theirs, ours = self.reference, self.engine
        text = split([prompt], ours.graphs)
        true_signals = {name: np.asarray(value) for name, value in theirs.vision(pixel_values).items()}
        signals = ours.vision(pixel_values)
        for name, value in true_signals.items():
            if value.dtype.kind == "f":
                self.vision.add(self.host(signals[name]), value)
        true_side = side
        if "question" in ours.graphs.files:
            asked = theirs.question(side["question_ids"])
            self.question.add(ours.question(side["question_ids"]), asked)
            true_side = {**side, "aligned_text": asked}
        true_visual = theirs.reduce(true_signals, text, true_side)
        visual = ours.reduce(true_signals, text, true_side)
        same = visual.index == true_visual.index
        self.index.append(float(same.mean()))
        self.reduce.add(visual.embeds[same], true_visual.embeds[same])
        chained = ours.reduce(signals, text, side)
        self.kept.append(_overlap(chained.index, true_visual.index))
        self._language_model(prompt, true_visual, chained)

    def _language_model(self, prompt: Sequence[int], true_visual: Visual, chained: Visual) -> None:
        theirs, ours = self.reference, self.engine
        true, found = theirs.prefill(true_visual, [prompt]), ours.prefill(true_visual, [prompt])
        self.prefill.add(found.logits, true.logits)
        for name, kept in true.kept.items():
            self.kept_inside.append(_overlap(found.kept[name], kept))
        expected: list[int] = []
        logits = true.logits
        while True:
            token = greedy(logits)
            expected.append(int(token[0]))
            if len(expected) == self.steps or expected[-1] in ours.graphs.text.eos:
                break
            logits = theirs.step(true.cache, token)
            self.decode.add(ours.step(found.cache, token), logits)
        free = ours.prefill(chained, [prompt])
        agreed, logits = 0, free.logits
        while agreed < len(expected) and int(greedy(logits)[0]) == expected[agreed]:
            agreed += 1
            if agreed < len(expected):
                logits = ours.step(free.cache, greedy(logits))
        self.tokens.append(agreed / len(expected))

    def stages(self, gates: Gates | None) -> list[StageFidelity]:
        """The record. Quantised weights score tokens differently inside the language model: there the kept tokens are
        measured only, and judged by quality."""
        kept, tokens = float(np.mean(self.kept)), float(np.mean(self.tokens))
        found = [
            self.vision.stage("vision"),
            *([self.question.stage("question")] if "question" in self.engine.graphs.files else []),
            replace(self.reduce.stage("reduce"), agreement=float(np.mean(self.index))),
            _gated(self.prefill.stage("prefill"), gates.logits_cosine_min if gates else None, "cosine"),
            _gated(self.decode.stage("decode"), gates.logits_cosine_min if gates else None, "cosine"),
            _gated(
                StageFidelity("kept tokens", agreement=kept), gates.kept_index_overlap_min if gates else None, "overlap"
            ),
        ]
        if self.kept_inside:
            inside = StageFidelity("kept in the LLM", agreement=float(np.mean(self.kept_inside)))
            exact = self.engine.graphs.weights == "none"
            found.append(
                _gated(inside, gates.kept_index_overlap_min if gates else None, "overlap") if exact else inside
            )
        found.append(
            _gated(
                StageFidelity("greedy tokens", agreement=tokens),
                gates.token_agreement_min if gates else None,
                "agreement",
            )
        )
        return found


def _gated(stage: StageFidelity, threshold: float | None, name: str) -> StageFidelity:
    """The stage with its verdict: agreement where there is one, else the cosine, against the threshold."""
    if threshold is None:
        return stage
    value = stage.cosine if stage.agreement is None else stage.agreement
    return replace(stage, gate=f"{name} ≥ {threshold:g}", passed=value is not None and value >= threshold)


def _overlap(found: npt.NDArray[np.int64], expected: npt.NDArray[np.int64]) -> float:
    """Share of the expected tokens that were kept too, row by row (and head by head); -1 is no token."""
    rows = int(np.prod(expected.shape[:-1]))
    pairs = zip(found.reshape(rows, -1), expected.reshape(rows, expected.shape[-1]), strict=True)
    tokens = [(f, e[e >= 0]) for f, e in pairs]
    return float(np.mean([np.isin(e, f).mean() if e.size else 1.0 for f, e in tokens]))


def answers(
    generator: Generator,
    prompt: Prompt,
    questions: Sequence[Question],
    known: Answers | None = None,
    log: Log = lambda text: None,
    batch: int | None = None,
) -> list[str]:
    """Greedy answers, in order. What is `known` is not asked again, and what is asked is known from then on."""
    graphs, known, batch = generator.graphs, known or Answers(), batch or BATCH
    batch = min(batch, generator.batch or batch)
    keys = [q.key for q in questions]
    missing = [i for i, key in enumerate(keys) if key not in known.known]
    for start in range(0, len(missing), batch):
        log(f"{len(questions) - len(missing) + start} of {len(questions)}")
        part = [questions[i] for i in missing[start : start + batch]]
        pixels = np.concatenate([images.preprocess(q.frames, graphs.image) for q in part])
        ids = [prompt.ask(q.question, graphs.visual.placeholders, graphs.visual.media) for q in part]
        side = prompt.side([q.question for q in part])
        result = generator.generate(pixels, ids, NEW_TOKENS, side=side)
        stop = set(graphs.text.eos)
        found = [prompt.decode([t for t in row if t not in stop]).strip() for row in result.tokens]
        known.add({keys[i]: answer for i, answer in zip(missing[start : start + batch], found, strict=True)})
    return [known.known[key] for key in keys]


def score(found: Sequence[str], questions: Sequence[Question]) -> dict[str, tuple[float, int]]:
    """kind → (sum of the scores, asked)"""
    return _scored("", "", found, questions).accuracy(questions).scores


def _scored(variant: str, label: str, found: Sequence[str], questions: Sequence[Question]) -> Asked:
    scores = [question.score(answer) for answer, question in zip(found, questions, strict=True)]
    return Asked(variant, label, list(found), scores)


def controls(plan: Plan) -> list[tuple[str, Plan]]:
    """The plan with random and with uniform selection in place of what acts before the language model, same count; behind the
    model's own projector where that shortens."""
    kept = min(step.after for step in plan.steps)
    per_frame = max(1, kept // plan.geometry.tower.frames)
    own = [_spec.format(step.method) for step in plan.unreduced().steps]
    where = ",space=llm" if own else ""
    return [
        (
            f"{name}, {per_frame} per image",
            make_plan(plan.checkpoint, [*own, f"{name}:keep={per_frame}{where}"], plan.profile, plan.request),
        )
        for name in ("random", "uniform")
    ]


def ask_reference(
    plan: Plan,
    prompt: Prompt,
    questions: Sequence[Question],
    known: Answers | None = None,
    log: Log = lambda text: None,
) -> list[str]:
    """Answers of the PyTorch reference for a plan."""
    from exporter.stages._reference import reference

    runners, graphs, table = reference(plan)
    return answers(Generator(runners, graphs, table), prompt, questions, known, log)


def ask_all(
    plan: Plan,
    engine: Mapping[str, Runner],
    graphs: GraphSet,
    table: Array,
    prompt: Prompt,
    questions: Sequence[Question],
    work: Workspace,
    executed: str,
    log: Log,
) -> list[Asked]:
    """Put the questions to the unreduced model, the reduced one, the engine, and the controls. What was answered before a kill is
    not asked again."""
    unreduced = plan.unreduced()
    reduces = plan.steps != unreduced.steps
    references = [("unreduced", "unreduced, PyTorch FP32", unreduced)]
    if reduces:
        references.append(("reduced", "reduced, PyTorch FP32", plan))
        references += [("control", name, control) for name, control in controls(plan)]
    found = []
    for variant, label, asked in references:
        known = _answers.of_plan(work.folder, label, asked)
        told = ask_reference(asked, prompt, questions, known, _naming(log, label))
        found.append(_scored(variant, label, told, questions))
    label = f"{'reduced' if reduces else 'unreduced'}, engine {plan.profile.name}"
    known = _answers.of_folder(work.folder, label, executed)
    batch = min(BATCH, plan.profile.limits.batch)
    generator = Generator(engine, graphs, table)
    told = answers(generator, prompt, questions, known, _naming(log, label), batch)
    before = [a for a in found if a.variant != "control"]
    return [*before, _scored("engine", label, told, questions), *(a for a in found if a.variant == "control")]


def _naming(log: Log, label: str) -> Log:
    return lambda text: log(f"asking the {label}: {text}")


def regressions(found: Sequence[Asked]) -> list[Regression]:
    """What the unreduced model answers right and the engine does not, in the order of the questions."""
    by_variant = {a.variant: a.scores for a in found}
    if "unreduced" not in by_variant or "engine" not in by_variant:
        return []
    before, now = by_variant["unreduced"], by_variant["engine"]
    reduced = by_variant.get("reduced", before)
    return [
        Regression(i, "precision" if reduced[i] >= RIGHT else "reduction")
        for i in range(len(now))
        if before[i] >= RIGHT > now[i]
    ]


def answered(number: int, question: Question, found: Sequence[Asked]) -> dict[str, Any]:
    """One question with everything that was answered, as data."""
    return {
        "number": number,
        "kind": question.kind,
        "question": question.question,
        "images": list(question.source),
        "metric": question.metric,
        "expected": [question.answer, *question.also],
        "answers": {a.label: {"answer": a.answers[number], "score": a.scores[number]} for a in found},
    }


def samples(questions: Sequence[Question], found: Sequence[Asked]) -> list[dict[str, Any]]:
    """Some answers to look at, evenly spread."""
    return [
        {
            "kind": questions[i].kind,
            "question": questions[i].question,
            "expected": questions[i].answer,
            "answers": {a.label: a.answers[i] for a in found},
            "right": {a.label: a.scores[i] >= RIGHT for a in found},
        }
        for i in range(0, len(questions), max(1, len(questions) // 8))
    ]


def quality_gates(found: Sequence[Asked], gates: Gates) -> list[QualityGate]:
    """What the profile asks of accuracy: of its precision, and, if it says so, of the reduction."""
    by_variant = {a.variant: a for a in found}
    pairs = [
        ("unreduced", "reduced", "the reduction costs", gates.reduction_drop_max),
        (
            "reduced" if "reduced" in by_variant else "unreduced",
            "engine",
            "the engine costs, against the same reduction in PyTorch,",
            gates.quality_drop_max,
        ),
    ]
    return [
        QualityGate(name, *points_lost(by_variant[before].scores, by_variant[now].scores), most)
        for before, now, name, most in pairs
        if most is not None and before in by_variant and now in by_variant
    ]


def points_lost(before: Sequence[float], now: Sequence[float]) -> tuple[float, float]:
    """Points lost on the same questions, and half of the 95 % interval."""
    lost = 100 * (np.array(before) - np.array(now))
    error = 1.96 * float(lost.std(ddof=1)) / len(lost) ** 0.5 if len(lost) > 1 else 100.0
    return float(lost.mean()), error


def verdict(fidelity: Sequence[StageFidelity], quality: Sequence[QualityGate]) -> list[str]:
    """Gates that did not pass, in words."""
    failed = [
        f"{s.stage}: {s.gate} asked, found {s.agreement if s.agreement is not None else s.cosine:.4f}"
        for s in fidelity
        if s.passed is False
    ]
    return failed + [f"quality: {gate.words()}" for gate in quality if not gate.passed]
