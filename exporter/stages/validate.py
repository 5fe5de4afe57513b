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
from exporter.stages import _recorded
from exporter.stages._task import Question, kinds, right
from profiles._schema import Gates

Log = Callable[[str], None]
STEPS = 32
"""Greedy tokens compared."""
BATCH = 16
"""Questions asked at once."""


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
    """Right answers of one variant: kind → (correct, asked)."""

    variant: str
    label: str
    scores: dict[str, tuple[int, int]]

    def percent(self) -> float:
        correct, asked = (sum(x) for x in zip(*self.scores.values(), strict=True))
        return 100 * correct / max(1, asked)


@dataclass(frozen=True)
class Validation:
    """The evidence. `failed`: gates that did not pass, in words."""

    fidelity: list[StageFidelity]
    quality: list[Accuracy]
    failed: list[str]
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)


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


def answers(generator: Generator, prompt: Prompt, questions: Sequence[Question], new_tokens: int = 8) -> list[str]:
    """Greedy answers, in order."""
    graphs = generator.graphs
    found: list[str] = []
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        pixels = np.concatenate([images.preprocess(q.frames, graphs.image) for q in part])
        ids = [prompt.ask(q.question, graphs.visual.placeholders, graphs.visual.media) for q in part]
        side = prompt.side([q.question for q in part])
        result = generator.generate(pixels, ids, new_tokens, side=side)
        stop = set(graphs.text.eos)
        found += [prompt.decode([t for t in row if t not in stop]).strip() for row in result.tokens]
    return found


def score(found: Sequence[str], questions: Sequence[Question]) -> dict[str, tuple[int, int]]:
    """kind → (correct, asked)"""
    scores = dict.fromkeys(kinds(questions), (0, 0))
    for answer, question in zip(found, questions, strict=True):
        correct, asked = scores[question.kind]
        scores[question.kind] = correct + right(answer, question.answer), asked + 1
    return scores


def controls(plan: Plan) -> list[tuple[str, Plan]]:
    """The plan with random and with uniform selection in place of what acts before the language model, same count."""
    kept = min(step.after for step in plan.steps)
    per_frame = max(1, kept // plan.geometry.tower.frames)
    return [
        (
            f"{name}, {per_frame} per image",
            make_plan(plan.checkpoint, [f"{name}:keep={per_frame}"], plan.profile, plan.request),
        )
        for name in ("random", "uniform")
    ]


def ask_reference(plan: Plan, prompt: Prompt, questions: Sequence[Question]) -> list[str]:
    """Answers of the PyTorch reference for a plan."""
    from exporter.stages._reference import reference

    runners, graphs, table = reference(plan)
    return answers(Generator(runners, graphs, table), prompt, questions)


def measure_quality(
    plan: Plan,
    engine: Mapping[str, Runner],
    graphs: GraphSet,
    table: Array,
    prompt: Prompt,
    questions: Sequence[Question],
    log: Log,
) -> tuple[list[Accuracy], list[dict[str, Any]]]:
    """Task scores of the unreduced model, the reduced one, the engine, and the controls; and some answers to look at."""
    found: list[tuple[str, str, list[str]]] = []
    log("asking the unreduced model")
    unreduced = make_plan(plan.checkpoint, [], plan.profile, plan.request)
    found.append(("unreduced", "unreduced, PyTorch FP32", ask_reference(unreduced, prompt, questions)))
    if plan.steps:
        log("asking the reduced model")
        found.append(("reduced", "reduced, PyTorch FP32", ask_reference(plan, prompt, questions)))
    log("asking the engine")
    label = f"{'reduced' if plan.steps else 'unreduced'}, engine {plan.profile.name}"
    found.append(("engine", label, answers(Generator(engine, graphs, table), prompt, questions)))
    if plan.steps:
        for name, control in controls(plan):
            log(f"asking the control {name}")
            found.append(("control", name, ask_reference(control, prompt, questions)))
    quality = [Accuracy(variant, label, score(answer, questions)) for variant, label, answer in found]
    samples = [
        {
            "kind": questions[i].kind,
            "question": questions[i].question,
            "expected": questions[i].answer,
            "answers": {label: answer[i] for _, label, answer in found},
        }
        for i in range(0, len(questions), max(1, len(questions) // 8))
    ]
    return quality, samples


def verdict(fidelity: Sequence[StageFidelity], quality: Sequence[Accuracy], gates: Gates) -> list[str]:
    """Gates that did not pass, in words."""
    failed = [
        f"{s.stage}: {s.gate} asked, found {s.agreement if s.agreement is not None else s.cosine:.4f}"
        for s in fidelity
        if s.passed is False
    ]
    by_variant = {a.variant: a for a in quality}
    same_maths = by_variant.get("reduced") or by_variant.get("unreduced")
    if same_maths is not None and "engine" in by_variant:
        drop = same_maths.percent() - by_variant["engine"].percent()
        if drop > gates.quality_drop_max:
            failed.append(
                f"quality: the engine answers {drop:.1f} points worse than the same reduction in PyTorch; "
                f"at most {gates.quality_drop_max:g} allowed"
            )
    return failed
