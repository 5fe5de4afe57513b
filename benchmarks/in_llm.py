"""Reductions inside the language model: what they save of prefill and cache, against what counting promises, and what is
still answered right.

    python -m benchmarks.in_llm

*Time*: prefill of a random decoder of 16 layers of hidden size 1024 on 1,024 visual and 32 text tokens (ONNX Runtime, FP32),
every method and the unreduced model in turn, in one process. *Ideal* is the ratio of floating-point operations
(`exporter.cost`). *Cache*: bytes of keys and values, counted and found. *Accuracy*: the embedded model's questions, in its
PyTorch reference, beside random and uniform selection before the language model of as many tokens as are left at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _common, methods
from benchmarks._common import Case, Model, Ratio, say, timed
from exporter.cost import formulas as cost
from exporter.job import Job
from graphs import _spec

FIRST = "unreduced"
FRAMES, TEXT = 4, 32
TIMED = (
    "fastv:layer=2,keep_ratio=0.5", "fastv:layer=3,keep_ratio=0.5", "pdrop", "vtw", "lookm:keep_ratio=0.1111",
    "dycoke_kv:keep_ratio=0.3", "sparsemm:keep_ratio=0.1111",
)  # fmt: skip
RATIOS = (0.5, 0.25, 1 / 9)


def speed(specs: Sequence[str], model: Model, rounds: int, threads: int, load: _common.Load) -> dict[str, Any]:
    """Prefill and cache of every method."""
    import onnx_ir as ir
    import torch

    from exporter.journal import Journal
    from exporter.nn.specs import DecoderSpec
    from exporter.stages._llm import draw_llm
    from exporter.stages._modules import build_modules, origins
    from exporter.stages._store import WeightFile

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="edgetrim-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        say("writing the checkpoint")
        llava, _ = _common.checkpoint(folder / "checkpoint", model)
        plans = {s: Job(str(llava), () if s == FIRST else (s,), "cpu_fp32", FRAMES).plan() for s in (FIRST, *specs)}
        plan = plans[FIRST]
        known = origins(plan, build_modules(plan))["llm"]
        files = folder / "graphs"
        files.mkdir()
        with WeightFile(
            files / "llm.data", Journal(files, {}), plan.checkpoint, known, torch.float32
        ) as file:  # one for all graphs
            for i, (spec, its) in enumerate(plans.items()):
                say(f"tracing {spec}")
                graph = draw_llm(its, build_modules(its).prefill, torch.float32)
                file.attach(graph)
                ir.save(graph, files / f"{i}.onnx")
        visual = plan.kept
        feeds = _feeds(visual, model)
        cases = []
        decoder = plan.family.decoder(plan.checkpoint)
        assert isinstance(decoder, DecoderSpec)
        full = cost.prefill_flops(decoder, [visual + TEXT] * model.layers)
        for i, (spec, its) in enumerate(plans.items()):
            runner = stack.enter_context(_common.runner(files / f"{i}.onnx", threads))
            mine = feeds | _empty_past(runner, model)
            out = runner.run(mine)
            entering, cached = ([n + TEXT for n in each] for each in (its.kv.entering, its.kv.cached))
            arrays = [runner.numpy(v) for name, v in out.items() if name.startswith(("present_key", "present_value"))]
            found[spec] = {
                "kept": its.kv.kept, "flops_share": cost.prefill_flops(decoder, entering) / full,
                "cache_bytes": cost.cache_bytes(decoder, cached, 4), "cache_bytes_found": sum(a.nbytes for a in arrays),
            }  # fmt: skip
            cases.append(Case.one(spec, lambda r=runner, f=mine: timed(lambda: r.run(f))))  # type: ignore[misc]
        samples = _common.interleave(cases, rounds, load, log=say)
        times = _common.times(samples)
        for spec, entry in found.items():
            entry["time"] = times[spec]
            if spec != FIRST:
                entry["speed_up"] = asdict(Ratio.of(samples, FIRST, spec))
                entry["of_ideal"] = asdict(Ratio.of(samples, FIRST, spec, entry["flops_share"]))
    return found


def _feeds(visual: int, model: Model) -> dict[str, Any]:
    """A prompt of two words, the image, the rest; visual tokens first, as the graphs take it."""
    rng = np.random.default_rng(0)
    order = np.concatenate([np.arange(visual) + 2, [0, 1], np.arange(visual + 2, visual + TEXT)])[None].astype(np.int64)
    embeds = rng.standard_normal((1, visual + TEXT, model.hidden)).astype(np.float32)
    return {"inputs_embeds": embeds, "position_ids": order, "order": order}


def _empty_past(runner: Any, model: Model) -> dict[str, Any]:
    """What the unreduced graph takes besides, being decode as well."""
    head_dim = model.hidden // model.heads
    return {
        name: np.empty((1, 0) if "order" in name else (1, model.kv_heads, 0, head_dim), dtype)
        for name, dtype in runner.inputs.items()
        if name.startswith("past_")
    }


def accuracy(names: Sequence[str], per_kind: int, jobs: int) -> dict[str, Any]:
    """As `benchmarks.methods`, for methods inside the language model."""
    return methods.accuracy(names, per_kind, jobs)


def text(entry: Mapping[str, Any]) -> str:
    """The record as tables."""
    rows = []
    full = entry["speed"][FIRST]
    for spec, e in entry["speed"].items():
        gain, of = e.get("speed_up"), e.get("of_ideal")
        rows.append([
            f"`{spec}`", " → ".join(map(str, e["kept"])), f"{100 * e['flops_share']:.1f}", f"{e['time']['median_ms']:.0f}",
            f"{gain['median']:.2f}×" if gain else "", f"{1 / e['flops_share']:.2f}×" if gain else "",
            Ratio(**{k: 100 * v for k, v in of.items()}) if of else "",
            f"{100 * e['cache_bytes_found'] / full['cache_bytes_found']:.1f}", f"{e['cache_bytes'] == e['cache_bytes_found']}",
        ])  # fmt: skip
    header = [
        "prefill",
        "visual tokens",
        "FLOPs %",
        "median ms",
        "faster",
        "ideal",
        "% of ideal (range)",
        "KV %",
        "KV as counted",
    ]
    parts = [_common.table(rows, header)]
    for media in methods.FRAMES:
        if any(e["media"] == media for entries in entry["accuracy"]["methods"].values() for e in entries):
            parts += methods.rows_of(entry["accuracy"], media)
    return "\n\n".join([*parts, _common.footer(entry)])


def main() -> None:
    parser = _common.options(__doc__, rounds=5)
    parser.add_argument("--per-kind", type=int, default=200, help="questions of each kind; 0: no accuracy")
    parser.add_argument("--jobs", type=int, default=2, help="processes that ask questions")
    parser.add_argument("--specs", nargs="+", default=list(TIMED), help="what is timed")
    options = parser.parse_args()
    _common.quiet()
    model, load = Model(), _common.Load(options.patience)
    names = [n for n in _spec.names() if _spec.load(n).place == "in_llm"]
    found: dict[str, Any] = {"accuracy": {"methods": {}}, "per_kind": options.per_kind}
    if options.per_kind:
        found["accuracy"] = accuracy(names, options.per_kind, options.jobs)
    found["speed"] = speed(options.specs, model, options.rounds, options.threads, load)
    settings = {"rounds": options.rounds, "threads": options.threads, "frames": FRAMES, "text_tokens": TEXT}
    entry = _common.record("in_llm", "fp32", model, settings, found, load)
    print(text(entry))
    print(_common.write(options.results, entry))


if __name__ == "__main__":
    main()
