"""What INT4 costs the embedded model: every quantiser and block size, unreduced and with reductions.

    python -m benchmarks.quantize

The engine is ONNX Runtime on the exported graphs. Against PyTorch in FP32 with the same reduction: Kullback-Leibler divergence of
what is said first (nats), how often the same answer is best, perplexity of the right answer's first token, and right answers.
Questions are on held-out digits, calibration is on digits that training has seen.

`--types` measures what types of weights cost instead, each in the profile of one GPU that has it, on the graphs in FP16.

`--kv` measures an INT8 cache instead, with float weights: prompts are run in chunks, so that all but the first read what those before
have left there. A prefill graph of its own runs whole and reads no cache, so reductions inside the language model are left out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import _common
from exporter import device
from exporter.engines import open_runners
from exporter.job import EMBEDDED, Job
from exporter.plan import Plan
from exporter.runtime import images
from exporter.runtime.generate import Generator
from exporter.runtime.prompt import Prompt
from exporter.runtime.sequence import split
from exporter.stages import _calibrate, _task
from exporter.stages._processor import prompt_of
from exporter.stages._reference import reference
from exporter.stages.export import export
from exporter.workspace import Workspace
from profiles._schema import quantizers

BLOCKS = (64, 32)
"""128 divides no matrix of this model."""
TYPES = ("rtx_5090_fp16", "rtx_5090_fp8", "rtx_5090_nvfp4", "rtx_5090_int4")
CHUNK = 8
"""Tokens of a prompt at once, where the cache is measured."""
REDUCTIONS = (
    "",
    "visionzip:keep=32,cls=off,position=keep",
    "fastv:layer=2,keep=16",
    "random:keep=32",
    "uniform:keep=32",
)


@dataclass(frozen=True)
class Score:
    """Of one variant. kl: nats; agreement: share of equal first tokens; perplexity; right: share of right answers, by kind."""

    reduction: str
    weights: str
    block: int
    kl: float
    agreement: float
    perplexity: float
    right: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--per-kind", type=int, default=200, help="questions of each kind")
    parser.add_argument("--threads", type=int, default=1)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kv", action="store_const", dest="what", const="kv_int8", help="an INT8 cache instead of INT4")
    what.add_argument("--types", action="store_const", dest="what", const="types", help="types of weights instead")
    parser.add_argument("--results", type=Path, default=_common.RESULTS, help="folder of the JSON record")
    args = parser.parse_args()
    _common.quiet()
    import torch

    torch.set_num_threads(args.threads)
    questions = _task.embedded(1, args.per_kind)
    scores: list[Score] = []
    precision = args.what or "int4"
    measure = {"int4": of_reduction, "kv_int8": of_cache, "types": of_types}[precision]
    for specs in REDUCTIONS:
        scores += measure(specs, questions, args.threads)
    entry = {
        "benchmark": "quantize",
        "command": f"python -m benchmarks.quantize --per-kind {args.per_kind} --threads {args.threads}"
        + {"int4": "", "kv_int8": " --kv", "types": " --types"}[precision],
        "precision": precision,
        "machine": device.machine(),
        "versions": device.versions(),
        "questions": len(questions),
        "calibration_questions": len(_task.for_calibration(1)),
        "scores": [asdict(s) for s in scores],
    }
    print(report(scores))
    print(_common.write(args.results, entry))


def of_reduction(specs: str, questions: Sequence[_task.Question], threads: int) -> list[Score]:
    """FP32 first, then every quantiser at every block size."""
    job = Job(EMBEDDED, tuple(filter(None, [specs])), "cpu_int4")
    plan = job.plan()
    prompt = prompt_of(plan)
    truth = [prompt.tokenizer.encode(q.answer, add_special_tokens=False).ids[0] for q in questions]
    _common.say(f"{specs or 'unreduced'}: fp32")
    exact = Generator(*reference(plan))
    expected = first_logits(exact, prompt, questions)
    found = [score(specs, "fp32", 0, expected, expected, truth, questions)]
    for name in quantizers():
        for block in BLOCKS:
            _common.say(f"{specs or 'unreduced'}: {name}, blocks of {block}")
            with ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                generator = engine(plan, name, block, folder, threads, stack)
                logits = first_logits(generator, prompt, questions)
                found.append(score(specs, name, block, expected, logits, truth, questions))
    return found


def of_types(specs: str, questions: Sequence[_task.Question], threads: int) -> list[Score]:
    """FP32 first, then every profile of `TYPES`, rounded to nearest."""
    plans = {name: Job(EMBEDDED, tuple(filter(None, [specs])), name).plan() for name in TYPES}
    plan = plans[TYPES[0]]
    prompt = prompt_of(plan)
    truth = [prompt.tokenizer.encode(q.answer, add_special_tokens=False).ids[0] for q in questions]
    _common.say(f"{specs or 'unreduced'}: fp32")
    expected = first_logits(Generator(*reference(plan)), prompt, questions)
    found = [score(specs, "fp32", 0, expected, expected, truth, questions)]
    for name, plan in plans.items():
        _common.say(f"{specs or 'unreduced'}: {name}")
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            logits = first_logits(exported(plan, folder, threads, stack), prompt, questions)
            found.append(score(specs, name, 0, expected, logits, truth, questions))
    return found


def of_cache(specs: str, questions: Sequence[_task.Question], threads: int) -> list[Score]:
    """FP32 first, then with an INT8 cache."""
    plan = Job(EMBEDDED, tuple(filter(None, [specs])), "cpu_fp32", kv="int8").plan()
    if plan.separate_prefill:
        return []
    prompt = prompt_of(plan)
    truth = [prompt.tokenizer.encode(q.answer, add_special_tokens=False).ids[0] for q in questions]
    _common.say(specs or "unreduced")
    expected = first_logits(Generator(*reference(plan)), prompt, questions)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        logits = first_logits(exported(plan, folder, threads, stack, CHUNK), prompt, questions)
    return [
        score(specs, name, 0, expected, found, truth, questions)
        for name, found in (("fp32", expected), ("fp32, INT8 cache", logits))
    ]


def engine(plan: Plan, name: str, block: int, folder: Path, threads: int, stack: ExitStack) -> Generator:
    precision = replace(plan.profile.precision, quantizer=name, blocks=(block,))
    plan = replace(plan, profile=replace(plan.profile, precision=precision))
    return exported(plan, folder, threads, stack)


def exported(plan: Plan, folder: Path, threads: int, stack: ExitStack, chunk: int | None = None) -> Generator:
    data = _task.for_calibration(1) if _calibrate.wanted(plan) else ()
    work = Workspace(folder)
    work.graphs.mkdir()
    export(plan, work.graphs, calibration=data)
    runners, graphs, table, _ = stack.enter_context(open_runners(folder, plan.profile, threads))
    return Generator(runners, graphs, table, chunk)


def first_logits(
    generator: Generator, prompt: Prompt, questions: Sequence[_task.Question], batch: int = 50
) -> npt.NDArray[np.float64]:
    """[questions, vocab], of the answers' first token."""
    graphs, found = generator.graphs, []
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        ids = [prompt.ask(q.question, graphs.visual.placeholders, graphs.visual.media) for q in part]
        pixels = np.concatenate([images.preprocess(q.frames, graphs.image) for q in part])
        visual = generator.reduce(generator.vision(pixels), split(ids, graphs))
        found.append(np.asarray(generator.prefill(visual, ids).logits, np.float64))
    return np.concatenate(found)


def score(
    specs: str, weights: str, block: int, expected: npt.NDArray[np.float64], logits: npt.NDArray[np.float64],
    truth: Sequence[int], questions: Sequence[_task.Question],
) -> Score:  # fmt: skip
    p, q = log_softmax(expected), log_softmax(logits)
    best = logits.argmax(-1)
    right = {
        kind: float(np.mean([best[i] == truth[i] for i, asked in enumerate(questions) if asked.kind == kind]))
        for kind in _task.kinds(questions)
    }
    return Score(
        specs or "unreduced", weights, block,
        kl=float((np.exp(p) * (p - q)).sum(-1).mean()),
        agreement=float((best == expected.argmax(-1)).mean()),
        perplexity=float(np.exp(-q[np.arange(len(truth)), list(truth)].mean())),
        right=right,
    )  # fmt: skip


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def report(scores: Sequence[Score]) -> str:
    rows: list[list[Any]] = [
        [
            s.reduction, s.weights if s.block == 0 else f"{s.weights}, {s.block}", f"{1e3 * s.kl:.2f}", f"{100 * s.agreement:.1f} %",
            f"{s.perplexity:.4f}", *(f"{100 * share:.1f} %" for share in s.right.values()),
        ]
        for s in scores
    ]  # fmt: skip
    kinds = list(scores[0].right)
    return _common.table(rows, ["reduction", "weights, block", "KL, 10⁻³ nats", "same answer", "perplexity", *kinds])


if __name__ == "__main__":
    main()
