"""Prefill of the language model with and without token reduction, and what selecting the tokens costs.

    python -m benchmarks.prefill --precision fp32

8 frames, 2048 visual tokens unreduced, then 8× and 16× fewer. Engines, all in one process and in turn: our export on ONNX
Runtime; the modules it was traced from, in PyTorch; Hugging Face's own Llama on the same embeddings; onnxruntime-genai on
as many tokens. Selection is timed as a graph of the method's nodes alone, without the projector.
"""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _common, _genai
from benchmarks._common import Case, Model, Ratio, Samples, timed
from exporter.backends._contract import Array, Runner
from exporter.job import Job
from exporter.nn.reduce import Reduce
from exporter.plan import Plan
from exporter.runtime.generate import Generator, Visual, embedding
from exporter.stages._modules import Modules, build_modules, load_reference
from exporter.stages._reference import reference
from exporter.stages.export import draw_reduce, draw_vision

ORT, EAGER, HF, GENAI = (
    "EdgeTrim, ONNX Runtime",
    "EdgeTrim modules, PyTorch",
    "transformers, PyTorch",
    "onnxruntime-genai",
)
FIRST = "1x"


@dataclass(frozen=True)
class Setting:
    """reductions: variant → specs; the first is the unreduced model. selections: further methods whose nodes are timed."""

    frames: int = 8
    text: int = 32
    reductions: tuple[tuple[str, tuple[str, ...]], ...] = (
        (FIRST, ()),
        ("8x", ("lftr:temporal=similarity,keep_frames=4,spatial=topic,keep=64",)),
        ("16x", ("lftr:temporal=similarity,keep_frames=4,spatial=topic,keep=32",)),
    )
    selections: tuple[str, ...] = ("visionzip:keep=32", "lftr:temporal=differential,keep_frames=4,spatial=text,keep=64")


def main() -> None:
    args = _common.options(__doc__, rounds=5).parse_args()
    _common.quiet()
    with tempfile.TemporaryDirectory(prefix="edgetrim-") as scratch:
        entry = measure(
            Path(scratch), Model(), Setting(), args.precision, args.rounds, args.threads, _common.Load(args.patience),
            not args.no_genai, _common.say,
        )  # fmt: skip
    print(text(entry))
    print(_common.write(args.results, entry))


def measure(
    folder: Path, model: Model, setting: Setting, precision: str, rounds: int, threads: int, load: _common.Load,
    genai: bool = True, log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """The record. `folder` takes some gigabytes."""
    import torch

    torch.set_num_threads(threads)
    log("writing the checkpoint")
    llava, llama = _common.checkpoint(folder / "checkpoint", model)
    prompt = _common.prompt(model, setting.frames, setting.text)
    images = _common.pixels(model, setting.frames)
    notes: dict[str, str] = {}
    cases: list[Case] = []
    checks: dict[str, float] = {}
    with ExitStack() as stack:
        log("exporting")
        exports = {
            name: _common.export(llava, folder / name, specs, setting.frames, precision)
            for name, specs in setting.reductions
        }
        generators = _open(stack, folder, exports, threads)
        visuals = {name: g.reduce(g.vision(images)) for name, g in generators.items()}
        tokens = {name: setting.text + v.embeds.shape[1] for name, v in visuals.items()}
        for name, generator in generators.items():
            cases.append(_prefill_case(f"{ORT}: {name}", generator, visuals[name], prompt, _repeats(tokens, name)))
        if precision == "fp32":
            log("loading the PyTorch references")
            eager = _eager({name: job for name, (job, _) in exports.items()})
            theirs = _common.load_llama(llama)
            table = embedding(folder / FIRST / "graphs", exports[FIRST][1])
            for name, generator in eager.items():
                cases.append(
                    _prefill_case(f"{EAGER}: {name}", generator, visuals[name], prompt, _repeats(tokens, name))
                )
                embeds = _in_order(visuals[name].embeds, table, prompt)
                cases.append(_hugging_face_case(f"{HF}: {name}", theirs, embeds, _repeats(tokens, name)))
                ours = generators[name].prefill(visuals[name], [prompt]).logits
                checks[f"{ORT} vs {EAGER}: {name}"] = _common.cosine(
                    ours, generator.prefill(visuals[name], [prompt]).logits
                )
                checks[f"{ORT} vs {HF}: {name}"] = _common.cosine(ours, _hugging_face(theirs, embeds))
        if genai and (why := _genai.missing()) is None:
            log("building with onnxruntime-genai")
            _genai.build(llama, folder / "genai", precision)
            opened = _genai.Genai(folder / "genai", threads)
            rng = np.random.default_rng(1)
            for name, count in tokens.items():
                ids = rng.integers(_common.FIRST_WORD, model.vocab, (count,))
                cases.append(_genai_case(f"{GENAI}: {name}", opened, ids, _repeats(tokens, name)))
            if precision == "fp32":
                checks[f"{GENAI} vs {HF}: same ids"] = _common.cosine(opened.logits(ids), _hugging_face(theirs, ids))
        else:
            notes[GENAI] = why if genai and why else "left out"
        log("tracing the selections")
        cases += _reduce_cases(stack, folder, generators, images)
        specs = [s for _, specs in setting.reductions for s in specs] + list(setting.selections)
        selections = {
            f"{kind}: {spec}": case
            for spec in specs
            for kind, case in _selection(stack, folder, exports[FIRST][0], spec, threads)
        }
        cases += [Case.one(name, case) for name, case in selections.items()]
        samples = _common.interleave(cases, rounds, load, log=log)
    found = {
        "visual_tokens": {name: v.embeds.shape[1] for name, v in visuals.items()},
        "tokens": tokens,
        "times": _common.times(samples),
        "speed_up": _speed_ups(samples, tokens),
        "against": _against(samples, list(tokens)),
        "selection": _shares(
            samples, {s: name for name, specs_ in setting.reductions for s in specs_}, setting.selections
        ),
        "cosine": checks,
        "notes": notes,
    }
    settings = {
        "rounds": rounds,
        "threads": threads,
        "frames": setting.frames,
        "text_tokens": setting.text,
        "reductions": dict(setting.reductions),
    }
    return _common.record("prefill", precision, model, settings, found, load)


# --- what is timed ----------------------------------------------------------------------------------------------------


def _open(stack: ExitStack, folder: Path, exports: Mapping[str, tuple[Job, Any]], threads: int) -> dict[str, Generator]:
    """A generator per variant. Reducing before the language model leaves its graph alone, so one session serves all."""
    first = folder / FIRST / "graphs"
    llm = stack.enter_context(_common.runner(first / "decode.onnx", threads))
    found = {}
    for name, (_, graphs) in exports.items():
        mine = folder / name / "graphs"
        assert filecmp.cmp(first / "decode.onnx", mine / "decode.onnx", shallow=False)
        runners: dict[str, Runner] = {
            role: stack.enter_context(_common.runner(mine / f"{role}.onnx", threads)) for role in ("vision", "reduce")
        }
        found[name] = Generator({**runners, "prefill": llm, "decode": llm}, graphs, embedding(mine, graphs))
    return found


def _eager(jobs: Mapping[str, Job]) -> dict[str, Generator]:
    """The same with PyTorch, which shares one decoder as well."""
    found: dict[str, Generator] = {}
    shared: Modules | None = None
    for name, job in jobs.items():
        plan = job.plan()
        modules = load_reference(plan)
        shared = shared or modules
        found[name] = Generator(*reference(plan, replace(modules, prefill=shared.decode, decode=shared.decode)))
    return found


def _repeats(tokens: Mapping[str, int], name: str) -> int:
    """Short prefills run more often in a round."""
    return min(3, max(1, tokens[FIRST] // tokens[name] // 2))


def _prefill_case(name: str, generator: Generator, visual: Visual, prompt: list[int], repeats: int) -> Case:
    return Case.one(name, lambda: timed(lambda: generator.prefill(visual, [prompt]), repeats))


def _genai_case(name: str, opened: _genai.Genai, ids: Array, repeats: int) -> Case:
    return Case.one(name, lambda: [opened.prefill(ids) for _ in range(repeats)])


def _hugging_face_case(name: str, model: Any, embeds: Array, repeats: int) -> Case:
    return Case.one(name, lambda: timed(lambda: _hugging_face(model, embeds), repeats))


def _hugging_face(model: Any, given: Array) -> Array:
    """Logits [1, vocab] behind embeddings [1, seq, hidden] or ids [seq]."""
    import torch

    tensor = torch.from_numpy(given)
    feeds = {"inputs_embeds": tensor} if given.ndim == 3 else {"input_ids": tensor[None]}
    with torch.inference_mode():
        logits: Array = model(**feeds, use_cache=True, logits_to_keep=1).logits[:, -1].numpy()
    return logits


def _in_order(embeds: Array, table: Array, prompt: list[int]) -> Array:
    """The prompt's embeddings as Hugging Face wants them: visual tokens where the image tokens were."""
    at = prompt.index(_common.IMAGE_TOKEN)
    words = [t for t in prompt if t != _common.IMAGE_TOKEN]
    rows = np.asarray(table[words], np.float32)[None]
    return np.concatenate([rows[:, :at], embeds, rows[:, at:]], 1)


def _reduce_cases(stack: ExitStack, folder: Path, generators: Mapping[str, Generator], images: Array) -> list[Case]:
    """The whole stage between tower and language model: methods and projector."""
    cases = []
    for name, generator in generators.items():
        signals = generator.vision(images)
        cases.append(Case.one(f"reduce stage: {name}", lambda g=generator, s=signals: timed(lambda: g.reduce(s), 5)))  # type: ignore[misc]
    return cases


def _selection(
    stack: ExitStack, folder: Path, job: Job, spec: str, threads: int
) -> list[tuple[str, Callable[[], list[float]]]]:
    """The method's nodes alone, on ONNX Runtime and in PyTorch, fed with noise: no method's work depends on the data."""
    import onnx_ir as ir
    import torch

    plan = replace(job, reductions=(spec,)).plan()
    module = Reduce(plan.before_llm, None, (*plan.for_reduce, *plan.side))
    graph = draw_reduce(plan, module, draw_vision(plan, build_modules(plan).vision, torch.float32), torch.float32)
    path = folder / f"selection-{len(list(folder.glob('selection-*.onnx')))}.onnx"
    ir.save(graph, path)
    runner = stack.enter_context(_common.runner(path, threads))
    feeds = _noise(graph, plan)
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}

    def eager() -> None:
        with torch.inference_mode():
            module(*tensors.values())

    return [
        ("selection, ONNX Runtime", lambda: timed(lambda: runner.run(feeds), 9)),
        ("selection, PyTorch", lambda: timed(eager, 9)),
    ]


def _noise(graph: Any, plan: Plan) -> dict[str, Array]:
    rng = np.random.default_rng(2)
    sizes = {"batch": 1, "text": 32}
    feeds = {}
    for value in graph.graph.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d)] for d in value.shape]
        feeds[value.name] = rng.normal(size=shape).astype(np.float32)
    if "text_mask" in plan.side:
        feeds["text_mask"] = np.ones_like(feeds["text_mask"])
    return feeds


# --- what it comes to -------------------------------------------------------------------------------------------------


def _speed_ups(samples: Samples, tokens: Mapping[str, int]) -> dict[str, Any]:
    """Per engine and variant: measured, ideal (as many times fewer tokens, text counted), and their quotient."""
    found = {}
    for engine in (ORT, EAGER, HF, GENAI):
        for name in tokens:
            if name != FIRST and f"{engine}: {name}" in samples:
                ideal = tokens[FIRST] / tokens[name]
                pair = (samples, f"{engine}: {FIRST}", f"{engine}: {name}")
                found[f"{engine}: {name}"] = {
                    "measured": asdict(Ratio.of(*pair)),
                    "ideal": ideal,
                    "of_ideal": asdict(Ratio.of(*pair, 1 / ideal)),
                }
    return found


def _against(samples: Samples, variants: list[str]) -> dict[str, Any]:
    """How many times longer the others take than ours."""
    return {
        f"{engine}: {name}": asdict(Ratio.of(samples, f"{engine}: {name}", f"{ORT}: {name}"))
        for engine in (EAGER, HF, GENAI)
        for name in variants
        if f"{engine}: {name}" in samples
    }


def _shares(samples: Samples, variant: Mapping[str, str], others: tuple[str, ...]) -> dict[str, Any]:
    """Selection as a share of the prefill behind it, and of the unreduced prefill. `others` keep as many tokens as 8×."""
    found = {}
    for spec in (*variant, *others):
        name = variant.get(spec, next(iter(variant.values())))
        above = f"selection, ONNX Runtime: {spec}"
        found[spec] = {
            "variant": name,
            "of_prefill": asdict(Ratio.of(samples, above, f"{ORT}: {name}")),
            "of_unreduced_prefill": asdict(Ratio.of(samples, above, f"{ORT}: {FIRST}")),
        }
    return found


def text(entry: Mapping[str, Any]) -> str:
    """The record as tables."""
    rows = []
    for engine in (ORT, EAGER, HF, GENAI):
        for name, count in entry["tokens"].items():
            key = f"{engine}: {name}"
            if key not in entry["times"]:
                continue
            t, gain = entry["times"][key], entry["speed_up"].get(key)
            against = entry["against"].get(key)
            rows.append([
                engine, name, count, f"{t['median_ms']:.0f}", f"{t['p90_ms']:.0f}",
                f"{gain['measured']['median']:.2f}×" if gain else "", f"{gain['ideal']:.2f}×" if gain else "",
                Ratio(**gain["of_ideal"]) if gain else "", Ratio(**against) if against else "",
            ])  # fmt: skip
    header = [
        "engine",
        "visual tokens",
        "tokens",
        "median ms",
        "p90 ms",
        "speed-up",
        "ideal",
        "of ideal (range)",
        "time ÷ ours (range)",
    ]
    parts = [_common.table(rows, header)]
    rows = []
    for spec, share in entry["selection"].items():
        t, eager = (entry["times"][f"selection, {kind}: {spec}"] for kind in ("ONNX Runtime", "PyTorch"))
        of, whole = (f"{100 * share[k]['median']:.2f} %" for k in ("of_prefill", "of_unreduced_prefill"))
        rows.append(
            [
                f"`{spec}`",
                share["variant"],
                f"{t['median_ms']:.2f}",
                f"{t['p90_ms']:.2f}",
                f"{eager['median_ms']:.2f}",
                of,
                whole,
            ]
        )
    header = ["selection", "variant", "median ms", "p90 ms", "PyTorch ms", "of prefill", "of unreduced prefill"]
    parts.append(_common.table(rows, header))
    stages = [
        [name.partition(": ")[2], f"{t['median_ms']:.2f}"]
        for name, t in entry["times"].items()
        if name.startswith("reduce stage")
    ]
    parts.append(_common.table(stages, ["reduce stage (selection and projector)", "median ms"]))
    parts += [f"{name}: cosine of logits {value:.7f}" for name, value in entry["cosine"].items()]
    parts += [f"{name}: {why}" for name, why in entry["notes"].items()]
    parts.append(_common.footer(entry))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
