"""DyRate beside FastV and VTW, in the layout of the paper's Table III: operations, latency, task score.

    python -m benchmarks.dyrate

The embedded model is taught to answer in sentences (`benchmarks._sentences`), DyRate's linear classifier and the GRU are
trained on it end to end, on training digits (`exporter.calibrators.dyrate`), and buckets are calibrated on more of them. Then every row is exported to
FP32 graphs for ONNX Runtime and answers the same questions on held-out digits, greedily; an answer counts if every word is
right. *Latency* is of a whole answer behind the vision side, all rows in turn. *FLOPs* are counted (`exporter.cost`), of
prefill and decode together, as this model has them and as Vicuna-7B would with 576 visual and 64 text tokens and the same
shares of them kept. *Every step anew* is the paper's own form, in PyTorch: each step ranks the whole image again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import _common, _sentences
from benchmarks._common import Case, Model, Ratio, say
from exporter.cost import formulas as cost
from exporter.job import Job
from exporter.nn.specs import DecoderSpec
from exporter.plan import Plan
from exporter.stages._task import Question

ORIGINAL = "original"
BASELINES = {
    ORIGINAL: (),
    "FastV, K=2, R=0.5": ("fastv:layer=2,keep_ratio=0.5",),
    "FastV, K=3, R=0.5": ("fastv:layer=3,keep_ratio=0.5",),
    "VTW, K=mid": ("vtw:k=2",),
    "random, before the LLM": ("random:keep_ratio=0.5",),
    "uniform, before the LLM": ("uniform:keep_ratio=0.5",),
}
STATE = 8
TIMED = 24
"""Questions whose answers are timed."""
SEVEN_B = DecoderSpec(
    hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocab=32000, eps=1e-5, activation="silu",
    qkv_bias=False, output_bias=False, inv_freq=(), rope_scale=1.0, mrope_section=None, windows=(None,) * 32,
    attention_scale=1.0,
)  # fmt: skip
SEVEN_B_VISUAL, SEVEN_B_TEXT = 576, 64


@dataclass(frozen=True)
class Row:
    """One answered row: its plan, what was right, the visual tokens of each answer's steps behind the cut."""

    plan: Plan
    right: dict[str, float]
    steps: list[list[int]]
    run: Any


def questions(count: int, seed: int, held_out: bool) -> list[Question]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        e = _sentences.asked(_sentences.KINDS[i % 2], rng, held_out)
        found.append(Question(e.kind, [Image.fromarray(f) for f in e.frames], e.question, e.answer))
    return found


def predictors(
    checkpoint: Path, folder: Path, layer: int, buckets: int, train_steps: int, price: float, test: Sequence[Question]
) -> tuple[dict[str, tuple[str, ...]], dict[str, Any]]:
    """Train the classifiers; specs of the rows to export, and what was found on the way."""
    from exporter.calibrators._predictor import Dropping, Predictor, Recipe, measure, train
    from exporter.calibrators._schedule import schedule, written

    rollout = Dropping(Job(str(checkpoint), (), "cpu_fp32").plan(), layer)
    rows: dict[str, tuple[str, ...]] = {}
    found: dict[str, Any] = {"unreduced": asdict(measure(rollout, None, test))}
    for name, state in (("linear", 0), (f"GRU {STATE}", STATE)):
        predictor = Predictor(10, state)
        train(rollout, predictor, questions(640, 11, False), Recipe(steps=train_steps, cost=price), say)
        file = folder / f"{name.replace(' ', '_').lower()}.safetensors"
        predictor.save(file)
        starts, counts = schedule(measure(rollout, predictor, questions(160, 12, False)).kept, buckets)
        if not state:
            rows["DyRate, buckets by schedule"] = (written(layer, starts, counts),)
        adaptive = written(layer, starts, counts, weights=str(file), rates=10, state=state)
        rows[f"DyRate, buckets by the classifier ({name})"] = (adaptive,)
        found[name] = {**asdict(measure(rollout, predictor, test)), "buckets": [starts, counts]}
    return rows, found


def answer(
    checkpoint: Path, specs: tuple[str, ...], folder: Path, threads: int, test: Sequence[Question], stack: ExitStack
) -> Row:
    """Export a row and let it answer everything."""
    from exporter.pipeline import run_export
    from exporter.runtime.generate import Generator, embedding
    from exporter.runtime.images import preprocess
    from exporter.runtime.prompt import Prompt
    from exporter.workspace import Workspace

    folder.mkdir(parents=True)
    job = Job(str(checkpoint), specs, "cpu_fp32")
    graphs = run_export(job, Workspace(folder))
    files = folder / "graphs"
    runners: dict[str, Any] = {}
    for file, roles in graphs.roles().items():
        opened = stack.enter_context(_common.runner(files / file, threads))
        runners |= dict.fromkeys(roles, opened)
    generator = Generator(runners, graphs, embedding(files, graphs))
    prompt = Prompt.load(files / "processor", graphs.text.image_token)
    hits: dict[str, list[bool]] = {}
    steps = []
    seen = []
    for q in test:
        ids = [prompt.ask(q.question, graphs.visual.placeholders)]
        visual = generator.reduce(generator.vision(preprocess(q.frames, graphs.image)))
        seen.append((visual, ids))
        result = generator.answer(visual, ids, 16)
        wanted = [*prompt.tokenizer.encode(q.answer).ids, graphs.text.eos[0]]
        hits.setdefault(q.kind, []).append(result.tokens[0] == wanted)
        cuts = dict(result.cache.shrunk.cuts) if result.cache.shrunk else {}
        left, row = graphs.text.kept[-1], []
        for step in range(len(result.tokens[0])):  # step 0 is prefill's; a cut after n tokens acts on step n + 1
            left = cuts.get(step - 1, left) if step else left
            row.append(left)
        steps.append(row)

    def run() -> list[float]:
        found = []
        for visual, ids in seen[:TIMED]:
            t = generator.answer(visual, ids, 16).timings
            found.append(t.prefill_ms + sum(t.decode_ms))
        return found

    return Row(job.plan(), {kind: float(np.mean(h)) for kind, h in hits.items()}, steps, run)


def flops(spec: DecoderSpec, row: Row, text: int, visual: int) -> float:
    """Mean operations of an answer; shares of visual tokens are this row's, their number is `visual`."""
    own, kv = row.plan.geometry.tower.total, row.plan.kv
    first = next((layer for layer, group in enumerate(kv.groups) if group), len(kv.groups))
    cut = first if spec.layers == len(kv.groups) else round(first * spec.layers / len(kv.groups))
    before = round(row.plan.kept / own * visual)
    total = 0.0
    for steps in row.steps:
        counts = [round(count / own * visual) for count in steps]
        layers = [before] * cut + [counts[0]] * (spec.layers - cut)
        total += cost.prefill_flops(spec, [n + text for n in layers])
        for step, count in enumerate(counts[1:], 1):
            layers = [before] * cut + [count] * (spec.layers - cut)
            total += cost.decode_flops(spec, [n + text + step for n in layers])
    return total / len(row.steps)


def measure(folder: Path, options: Any, load: _common.Load) -> dict[str, Any]:
    """The record's findings."""
    checkpoint = _sentences.teach(options.work or folder / "sentences", log=say)
    test = questions(2 * options.per_kind, 13, True)
    found: dict[str, Any] = {"predictors": {}, "rows": {}}
    specs: dict[str, tuple[str, ...]] = dict(BASELINES)
    for layer in options.layers:
        trained, record = predictors(
            checkpoint, folder / f"layer{layer}", layer, options.buckets, options.train_steps, options.cost, test
        )
        specs |= {f"{name}, layer {layer}": spec for name, spec in trained.items()}
        found["predictors"][str(layer)] = record
    with ExitStack() as stack:
        rows = {}
        for i, (name, spec) in enumerate(specs.items()):
            say(f"{name}: {' '.join(spec)}")
            rows[name] = answer(checkpoint, spec, folder / f"row{i}", options.threads, test, stack)
        samples = _common.interleave([Case.one(n, r.run) for n, r in rows.items()], options.rounds, load, log=say)
        times = _common.times(samples)
        plain = rows[ORIGINAL]
        decoder = plain.plan.family.decoder(plain.plan.checkpoint)
        assert isinstance(decoder, DecoderSpec)
        whole = [flops(s, plain, t, v) for s, t, v in _models(decoder, plain)]
        for name, row in rows.items():
            parts = [flops(s, row, t, v) for s, t, v in _models(decoder, plain)]
            found["rows"][name] = {
                "specs": [s.replace(str(folder), "…") for s in specs[name]], "right": row.right,
                "flops_share": parts[0] / whole[0], "flops_share_7b": parts[1] / whole[1],
                "visual_tokens_per_step": _mean_steps(row.steps), "time": times[name],
                **({"latency": asdict(Ratio.of(samples, name, ORIGINAL))} if name != ORIGINAL else {}),
            }  # fmt: skip
    return found


def _models(decoder: DecoderSpec, plain: Row) -> list[tuple[DecoderSpec, int, int]]:
    return [(decoder, 16, plain.plan.geometry.tower.total), (SEVEN_B, SEVEN_B_TEXT, SEVEN_B_VISUAL)]


def _mean_steps(steps: Sequence[Sequence[int]]) -> list[float]:
    longest = max(map(len, steps))
    return [float(np.mean([row[i] for row in steps if i < len(row)])) for i in range(longest)]


def text(entry: Mapping[str, Any]) -> str:
    """The record as tables."""
    rows = [
        [
            name, f"{100 * e['flops_share']:.1f}", f"{100 * e['flops_share_7b']:.1f}", f"{e['time']['median_ms']:.2f}",
            Ratio(**e["latency"]) if "latency" in e else "1", *(f"{100 * share:.1f}" for share in e["right"].values()),
            " ".join(f"{n:.0f}" for n in e["visual_tokens_per_step"]),
        ]
        for name, e in entry["rows"].items()
    ]  # fmt: skip
    header = [
        "method",
        "FLOPs %",
        "FLOPs % at 7B",
        "ms an answer",
        "÷ original (range)",
        "cell %",
        "count %",
        "visual tokens per step",
    ]
    parts = [_common.table(rows, header)]
    for layer, found in entry["predictors"].items():
        learned = [
            [
                name, f"{100 * e['right']:.1f}", " ".join(f"{n:.0f}" for n in e["kept"]),
                " ".join(f"{100 * s[1]:.0f}" for s in e["shares"]),
            ]
            for name, e in found.items()
        ]  # fmt: skip
        parts.append(
            _common.table(
                learned,
                [
                    f"every step anew, layer {layer}",
                    "right %",
                    "visual tokens kept per step",
                    "attention to the image % per step",
                ],
            )
        )
    return "\n\n".join([*parts, _common.footer(entry)])


def main() -> None:
    parser = _common.options(__doc__, rounds=9)
    parser.add_argument("--per-kind", type=int, default=200, help="held-out questions of each kind")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2], help="layers from which on DyRate drops")
    parser.add_argument("--buckets", type=int, default=3)
    parser.add_argument("--train-steps", type=int, default=200)
    parser.add_argument("--cost", type=float, default=0.1, help="of keeping every visual token, in nats")
    parser.add_argument(
        "--work", type=Path, help="folder of the model that answers in sentences, kept for the next run"
    )
    options = parser.parse_args()
    _common.quiet()
    load = _common.Load(options.patience)
    with tempfile.TemporaryDirectory(prefix="edgetrim-") as temporary:
        found = measure(Path(temporary), options, load)
    settings = {
        "rounds": options.rounds, "threads": options.threads, "per_kind": options.per_kind, "train_steps": options.train_steps,
        "cost": options.cost, "buckets": options.buckets,
    }  # fmt: skip
    entry = _common.record("dyrate", "fp32", replace(Model(), hidden=192, layers=4), settings, found, load)
    print(text(entry))
    print(_common.write(options.results, entry))


if __name__ == "__main__":
    main()
