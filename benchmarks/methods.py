"""Every reduction before the LLM at 50, 25 and 11 %: does the model still answer right, and what does choosing cost?

    python -m benchmarks.methods

measures, writes a record into benchmarks/results/, and docs/methods-evidence.md with its plots from that record.
`--page RECORD` only writes the page again.

*Accuracy*: the embedded model's questions, in its PyTorch reference (this is about methods, not engines), beside random
selection (five draws) and uniform selection of as many tokens. Methods that renumber positions are tried with original
positions too. *Cost*: the method's nodes alone, traced for LLaVA-1.5-7B's shapes (576 tokens of width 1024, 4096 behind
the projector, down to 64; clips: 4 frames of it), on ONNX Runtime, as a share of the unreduced prefill of 32 layers of
hidden size 4096, of which one is timed, in the same run, and counted 32 times.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _common
from benchmarks._common import Case, say, timed
from exporter import methods
from exporter.job import EMBEDDED, Job, folder_of
from graphs import _spec
from graphs._contract import BeforeLLM, InTower

RATIOS = (0.5, 0.25, 1 / 9)
CONTROLS = ("random", "uniform")
SEEDS = 5
"""Draws of the random control."""
FRAMES = {"image": 1, "clip": methods.CLIP}
LAYERS, TEXT, KEEP = 32, 64, 1 / 9
DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "methods-evidence.md"

Score = dict[str, tuple[float, int]]
"""Kind of question → sum of the scores, asked."""


# --- accuracy ---------------------------------------------------------------------------------------------------------


@cache
def _questions(media: str, per_kind: int) -> Any:
    from exporter.stages import _task

    return _task.embedded(FRAMES[media], per_kind)


def score(spec: str | None, media: str, per_kind: int) -> tuple[Score, int]:
    """Right answers per kind of question, and the visual tokens that were left. One thread; for a process of a pool."""
    import torch

    from exporter.runtime.prompt import Prompt
    from exporter.stages import validate

    torch.set_num_threads(1)
    plan = Job(EMBEDDED, (spec,) if spec else (), "cpu_fp32", FRAMES[media]).plan()
    prompt = Prompt.load(plan.checkpoint.folder, plan.geometry.image_token)
    questions = _questions(media, per_kind)
    left = min([s.after for s in plan.steps], default=plan.kept)
    return validate.score(validate.ask_reference(plan, prompt, questions), questions), left


def tried(name: str) -> list[tuple[str, str, float]]:
    """(media, spec, keep ratio) of everything a method is asked to do; images if it takes them, else clips. Ratios that lead
    to the same count are tried once."""
    from exporter.checkpoint import Checkpoint

    found, counts, checkpoint = [], set(), Checkpoint(folder_of(EMBEDDED))
    for ratio in RATIOS:
        fit = methods.fit(name, checkpoint, round(ratio, 4))
        if fit.plan is None:
            continue
        (step,) = fit.plan.steps
        if step.after in counts:
            continue
        counts.add(step.after)
        media = "image" if fit.image else "clip"
        found.append((media, fit.spec, ratio))
        if getattr(step.method, "position", None) == "compact":
            own, plus, inner = fit.spec.partition("+")
            found.append((media, f"{own},position=keep{plus}{inner}", ratio))
    return found


def accuracy(names: Sequence[str], per_kind: int, jobs: int) -> dict[str, Any]:
    """Scores of every method, of the unreduced model, and of the controls at every token count that was met."""
    wanted = {name: tried(name) for name in names}
    with ProcessPoolExecutor(jobs) as pool:
        full = {media: pool.submit(score, None, media, per_kind) for media in FRAMES}
        runs = {
            name: [(media, spec, ratio, pool.submit(score, spec, media, per_kind)) for media, spec, ratio in entries]
            for name, entries in wanted.items()
            if name not in CONTROLS
        }
        found: dict[str, Any] = {}
        for name, entries in runs.items():
            found[name] = [
                {"media": media, "spec": spec, "ratio": ratio, "kept": got.result()[1], "score": got.result()[0]}
                for media, spec, ratio, got in entries
            ]
            say(f"{name}: " + ", ".join(f"{e['kept']} tokens {_percent(e['score']):.0f} %" for e in found[name]))
        counts = sorted({(e["media"], e["kept"]) for entries in found.values() for e in entries})
        controls = {
            (media, kept): [
                pool.submit(score, spec, media, per_kind)
                for per_frame in [max(1, round(kept / FRAMES[media]))]
                for spec in [f"uniform:keep={per_frame}", *(f"random:keep={per_frame},seed={s}" for s in range(SEEDS))]
            ]
            for media, kept in counts
        }
        listed = []
        for (media, kept), got in controls.items():
            uniform, *draws = [g.result()[0] for g in got]
            listed.append({"media": media, "kept": kept, "uniform": uniform, "random": draws})
            say(f"controls, {media}, {kept} tokens")
        return {
            "full": {media: got.result()[0] for media, got in full.items()},
            "methods": found,
            "controls": listed,
        }


def _percent(found: Mapping[str, Sequence[int]]) -> float:
    """Right answers over all kinds."""
    return 100 * sum(right for right, _ in found.values()) / max(1, sum(asked for _, asked in found.values()))


# --- cost -------------------------------------------------------------------------------------------------------------


def selection(name: str, folder: Path) -> tuple[str, Path, int] | None:
    """The method's nodes alone, for LLaVA-1.5-7B's shapes: (media, file, nodes); None if it fits neither image nor clip."""
    import onnx_ir as ir
    import torch

    fit = methods.fit(name, methods.published("llava"), round(KEEP, 4))
    if fit.plan is None:
        return None
    (step,) = fit.plan.steps
    if isinstance(step.method, InTower):
        model = _in_tower(step.method, step.site)
    else:
        assert isinstance(step.method, BeforeLLM)
        from exporter.nn.reduce import Reduce
        from exporter.stages._describe import reduce_outputs, side_inputs
        from exporter.stages._draw import DTYPES, draw
        from exporter.stages._modules import build_modules
        from exporter.stages.export import draw_vision

        vision = draw_vision(fit.plan, build_modules(fit.plan).vision, torch.float32)
        inputs: dict[str, Any] = {}
        for value in vision.graph.outputs:
            assert value.name and value.dtype and value.shape
            shape = (
                ["batch", *value.shape.numpy()[1:]] if value.shape.is_static() else ["batch", *list(value.shape)[1:]]
            )
            if step.method.space == "llm" and value.name.partition("@")[0] in ("hidden", "cls"):
                shape[-1] = fit.plan.geometry.hidden
            inputs[value.name] = tuple(shape), DTYPES[value.dtype]
        for side, (shape_, kind) in side_inputs(fit.plan).items():
            inputs[side] = ("batch", *shape_), kind or torch.float32
        module = Reduce(fit.plan.before_llm, None, (*fit.plan.for_reduce, *fit.plan.side), fit.plan.sized)
        model = draw(module, inputs, lambda v: module(*v.values()), reduce_outputs(fit.plan.sized))
    path = folder / f"{name}.onnx"
    ir.save(model, path)
    return ("image" if fit.image else "clip"), path, len(list(model.graph))


def _in_tower(method: InTower, site: Any) -> Any:
    """All of a method's blocks in a row, with the signals it needs made from the tokens as a block makes them."""
    import torch

    from exporter.nn.layers import split_heads
    from exporter.nn.vit import IN_TOWER
    from exporter.stages._trace import trace

    class Blocks(torch.nn.Module):
        def forward(self, hidden: Any) -> Any:
            size = torch.ones_like(hidden[..., 0], dtype=torch.float32)
            for block in method.blocks:
                q = split_heads(hidden.flatten(0, 1), 16)
                frames = hidden.shape[1]
                signals = {
                    n: f(q, q, q, None).unflatten(0, (-1, frames)) for n, f in IN_TOWER.items() if n in method.needs
                }
                out = method.forward(block, signals | {"hidden": hidden, "size": size}, 1)
                assert out.size is not None
                hidden, size = out.tokens, out.size
            return hidden, size

    example = torch.zeros(2, site.frames, site.tokens + 1, site.dim)
    return trace(Blocks(), {"hidden": example}, {"hidden": {0: "batch"}}, ["tokens", "size"])


def layer(folder: Path) -> Path:
    """One decoder layer of Vicuna-7B's shape with random weights, prefill only."""
    import onnx_ir as ir
    import torch

    from exporter.nn.decoder_layer import Frame, Layer
    from exporter.nn.specs import DecoderSpec
    from exporter.stages._trace import trace

    published = methods.published("llava")
    plan = methods.fit("uniform", published).plan
    assert plan is not None
    decoder = plan.family.decoder(published)
    assert isinstance(decoder, DecoderSpec)
    spec = replace(decoder, layers=1, windows=(None,))

    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frame, self.layer = Frame(spec), Layer(spec)
            for parameter in self.parameters():
                parameter.data.normal_(0, 0.02)

        def forward(self, x: Any, order: Any) -> Any:
            cos, sin, _, mask = self.frame(x, order, order, None, None, None)
            return self.layer(x, cos, sin, mask, None, None)[:3]

    example = {"x": torch.zeros(2, 7, spec.hidden), "order": torch.zeros(2, 7, dtype=torch.int64)}
    axes = {0: "batch", 1: "seq"}
    model = trace(One(), example, {"x": axes, "order": axes}, ["y", "key", "value"])
    path = folder / "layer.onnx"
    ir.save(model, path, external_data="layer.data")
    return path


def cost(names: Sequence[str], rounds: int, threads: int, load: _common.Load) -> dict[str, Any]:
    """Milliseconds of every method's nodes and of one layer, interleaved; and how many nodes."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        prefill = stack.enter_context(_common.runner(layer(folder), threads))
        rng = np.random.default_rng(0)
        cases = []
        for media, frames in FRAMES.items():
            seq = 576 * frames + TEXT
            x = rng.standard_normal((1, seq, 4096)).astype(np.float32)
            feeds = {"x": x, "order": np.arange(seq)[None]}
            cases.append(Case.one(f"layer, {media}", lambda f=feeds: timed(lambda: prefill.run(f))))  # type: ignore[misc]
        for name in names:
            made = selection(name, folder)
            if made is None:
                continue
            media, path, nodes = made
            runner = stack.enter_context(_common.runner(path, threads))
            feeds = _noise(path, rng)
            cases.append(Case.one(name, lambda r=runner, f=feeds: timed(lambda: r.run(f), 3)))  # type: ignore[misc]
            found[name] = {"media": media, "nodes": nodes}
            say(f"{name}: {nodes} nodes")
        samples = _common.interleave(cases, rounds, load, log=say)
        for name, entry in found.items():
            share = _common.Ratio.of(samples, name, f"layer, {entry['media']}", 1 / LAYERS)
            entry |= {
                "ms": float(np.median(samples[name])),
                "share": share.median,
                "share_range": [share.low, share.high],
            }
        layers = {media: float(np.median(samples[f"layer, {media}"])) for media in FRAMES}
    return {"layer_ms": layers, "layers": LAYERS, "text": TEXT, "methods": found}


def _noise(path: Path, rng: np.random.Generator) -> dict[str, Any]:
    """Feeds of a selection graph: no method's work depends on the data."""
    import onnx

    sizes, feeds = {"batch": 1, "text": TEXT}, {}
    for value in onnx.load(path, load_external_data=False).graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value or sizes[d.dim_param] for d in tensor.shape.dim]
        whole = tensor.elem_type == onnx.TensorProto.INT64
        feeds[value.name] = rng.integers(0, 8, shape) if whole else rng.random(shape).astype(np.float32)
    return feeds


# --- the page ---------------------------------------------------------------------------------------------------------


def page(record: Mapping[str, Any]) -> str:
    """docs/methods-evidence.md from a record."""
    found, machine = record["accuracy"], record["machine"]
    lines = [
        "# How the reductions do",
        "",
        "<!-- Generated by `python -m benchmarks.methods`. -->",
        "",
        "Accuracy of the [embedded model](embedded.md) on its own questions (held-out digits; "
        f"{record['per_kind']} of each kind), every method at its defaults, at about 50, 25 and 11 % of the tokens; and what "
        "choosing costs. The model is small and its task is synthetic: this shows that methods do what they say and where "
        "they break, not how they rank on GQA or VideoMME. Every row stands beside random selection (mean of "
        f"{SEEDS} draws) and uniform selection of *as many* tokens. **Loses** marks methods that are worse than random by more "
        "than twice the standard error; they stay, because this page is what they are judged by.",
        "",
        "**Positions decide more than the choice.** Most official codes hand the language model a shorter sequence, which renumbers "
        "the positions of what is left (`position=compact`). This model finds a cell by the place of its tokens and breaks down then, "
        "whatever was chosen; the same choice with original positions (`position=keep`) is what judges a method. Both are shown.",
        "",
        f"Measured {machine['utc'][:10]}, FP32, PyTorch {record['versions']['torch']}; record: "
        f"[{record['file']}](../benchmarks/results/{record['file']}), made by `{record['command']}`.",
        "",
    ]
    for media, kinds in (("image", "one image, 64 tokens"), ("clip", f"a clip of {methods.CLIP} frames, 256 tokens")):
        full = found["full"][media]
        said = ", ".join(f"{kind} {100 * r / n:.1f} %" for kind, (r, n) in full.items())
        lines += [f"## {'Images' if media == 'image' else 'Clips'}: {kinds}", "", f"Unreduced: {said}.", ""]
        lines += [f"![Accuracy against tokens kept, {media}s](methods-{media}.svg)", ""]
        lines += rows_of({**found, "methods": shown(found)}, media)
    return "\n".join([*lines, *_costs(record)]).rstrip() + "\n"


def shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """The methods that act before the language model: inside it, early layers still see every token."""
    return {name: entries for name, entries in found["methods"].items() if _spec.load(name).place != "in_llm"}


def rows_of(found: Mapping[str, Any], media: str) -> list[str]:
    """The table of one medium: every method found, beside the controls."""
    controls = {c["kept"]: c for c in found["controls"] if c["media"] == media}
    kinds = list(found["full"][media])
    header = ["method", "tokens", *kinds, *(f"random {k}" for k in kinds), *(f"uniform {k}" for k in kinds), ""]
    rows = []
    for entries in found["methods"].values():
        for entry in entries:
            if entry["media"] != media:
                continue
            control = controls[entry["kept"]]
            row = [f"`{_label(entry['spec'])}`", entry["kept"]]
            row += [f"{100 * entry['score'][k][0] / entry['score'][k][1]:.1f}" for k in kinds]
            row += [f"{_mean(control['random'], k):.1f}" for k in kinds]
            row += [f"{100 * control['uniform'][k][0] / control['uniform'][k][1]:.1f}" for k in kinds]
            rows.append([*row, verdict(entry["score"], control["random"])])
    return [_common.table(rows, header), ""]


def _label(spec: str) -> str:
    """The spec without its ratio."""
    parts = []
    for part in spec.split("+"):
        name, _, rest = part.partition(":")
        fixed = [item for item in rest.split(",") if item and not item.startswith("keep_ratio=")]
        parts.append(f"{name}:{','.join(fixed)}" if fixed else name)
    return "+".join(parts)


def _mean(draws: Sequence[Mapping[str, Sequence[int]]], kind: str) -> float:
    return 100 * float(np.mean([d[kind][0] / d[kind][1] for d in draws]))


def verdict(found: Mapping[str, Sequence[int]], draws: Sequence[Mapping[str, Sequence[int]]]) -> str:
    """Over all kinds, against the mean of the random draws: "better", "**loses**", or "level" within two standard errors.

    The error is that of both: of the answers (binomial) and of the draws' mean.
    """
    mine, theirs = _percent(found) / 100, [_percent(d) / 100 for d in draws]
    asked = sum(n for _, n in found.values())
    mean = float(np.mean(theirs))
    spread = float(np.var(theirs, ddof=1)) / len(theirs) if len(theirs) > 1 else 0.0
    pooled = (mine + mean) / 2
    error = math.sqrt(pooled * (1 - pooled) / asked + spread)
    if mine > mean + 2 * error:
        return "better"
    return "**loses**" if mine < mean - 2 * error else "level"


def _costs(record: Mapping[str, Any]) -> list[str]:
    found = record.get("cost")
    if not found:
        return []
    layers = found["layer_ms"]
    rows = [
        [f"`{name}`", e["media"], e["nodes"], f"{e['ms']:.1f}", f"{100 * e['share']:.3f}"]
        for name, e in sorted(found["methods"].items(), key=lambda item: -item[1]["share"])
    ]
    above = [name for name, e in found["methods"].items() if e["share"] > 0.02]
    said = (
        "Every method stays below 2 %."
        if not above
        else f"Above 2 %: {', '.join(f'`{n}`' for n in above)}; what they compute is in their docstrings."
    )
    return [
        "## What choosing costs",
        "",
        f"The method's nodes alone on ONNX Runtime's CPU provider at LLaVA-1.5-7B's shapes, 576 tokens to 64 (clips: "
        f"{methods.CLIP} × 576 to {methods.CLIP * 64}), as a share of the unreduced prefill with {found['text']} text tokens: "
        f"{found['layers']} × one layer of hidden size 4096, which takes {layers['image']:.0f} ms for the image and "
        f"{layers['clip']:.0f} ms for the clip. In the tower: all blocks together, with the attention maps a method asks for. "
        f"{said}",
        "",
        f"{_common.footer({**record, 'precision': 'fp32'})}.",
        "",
        _common.table(rows, ["method", "on", "nodes", "ms", "% of prefill"]),
    ]


def plot(record: Mapping[str, Any], media: str) -> str:
    """Accuracy over all kinds against tokens kept: every method, the controls, and the front, as SVG."""
    import io

    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "edgetrim"
    found = record["accuracy"]
    total = {"image": 64, "clip": 256}[media]
    figure, axes = plt.subplots(figsize=(9, 5.6))
    points = []
    for name, entries in shown(found).items():
        best: dict[int, float] = {}
        for e in entries:
            if e["media"] == media:
                best[e["kept"]] = max(best.get(e["kept"], 0.0), _percent(e["score"]))
        points += [(100 * kept / total, value, name) for kept, value in best.items()]
    axes.scatter(
        [p[0] for p in points], [p[1] for p in points], s=18, color="#4c78a8", label="methods (better position policy)"
    )
    front: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    axes.plot([p[0] for p in front], [p[1] for p in front], color="#e45756", linewidth=1.2, label="Pareto front")
    labels: list[tuple[float, float]] = []
    for x in sorted({p[0] for p in points}):
        for y, name in sorted(((p[1], p[2]) for p in points if p[0] == x), reverse=True)[:2]:
            if any(abs(y - b) < 3 and abs(math.log(x / a)) < 0.3 for a, b in labels):
                continue
            labels.append((x, y))
            colour = "#e45756" if (x, y, name) in front else "#4c78a8"
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, -3), fontsize=8, color=colour)
    controls = sorted((c for c in found["controls"] if c["media"] == media), key=lambda c: c["kept"])
    ratios = [100 * c["kept"] / total for c in controls]
    random = [float(np.mean([_percent(d) for d in c["random"]])) for c in controls]
    axes.plot(ratios, random, "--", color="#777777", label=f"random (mean of {SEEDS})")
    axes.plot(ratios, [_percent(c["uniform"]) for c in controls], ":", color="#777777", label="uniform")
    axes.axhline(_percent(found["full"][media]), color="#999999", linewidth=0.8)
    axes.set(xscale="log", xlabel="visual tokens kept (%)", ylabel="right answers (%)", ylim=(0, 102))
    axes.set_xticks([10, 25, 50, 100], ["10", "25", "50", "100"])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def write_page(record: Mapping[str, Any]) -> None:
    for media in FRAMES:
        (DOCS / f"methods-{media}.svg").write_text(plot(record, media), encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")


def main() -> None:
    parser = _common.options(__doc__, rounds=5)
    parser.add_argument("--per-kind", type=int, default=200, help="questions of each kind")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that ask questions")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these methods only; then no page is written")
    parser.add_argument("--no-cost", action="store_true", help="accuracy only; then no page is written")
    parser.add_argument("--page", type=Path, metavar="RECORD", help="write the page from this record, measure nothing")
    options = parser.parse_args()
    if options.page:
        write_page(json.loads(options.page.read_text()))
        return
    _common.quiet()
    names = options.only or [n for n in _spec.names() if n not in CONTROLS and _spec.load(n).place != "in_llm"]
    load = _common.Load(options.patience)
    found = {"accuracy": accuracy(names, options.per_kind, options.jobs), "per_kind": options.per_kind}
    if not options.no_cost:
        found["cost"] = cost(names, options.rounds, options.threads, load)
    settings = {"rounds": options.rounds, "threads": options.threads}
    record = _common.record("methods", "fp32", _common.Model(), settings, found, load)
    del record["model"]
    record["file"] = _common.write(options.results, record).name
    path = options.results / record["file"]
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.only is None and not options.no_cost:
        write_page(record)
    say(f"written: {path}")
    sys.stdout.write(page(record))


if __name__ == "__main__":
    main()
