"""bench: latency per stage, every variant in one process, in turn, so that the machine's mood hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exporter.backends._contract import Array, Layer, Runner
from exporter.graphset import GraphSet
from exporter.runtime.generate import Generator

STAGES = ("vision", "question", "reduce", "prefill", "decode", "ttft")
"""decode is the time per output token; ttft the time from pixels to the first token. question only where there is one."""

LAYERS = "evidence/layers.json"
"""What the engines became, see `layers`."""
PROFILED = 4
"""Rounds of which a profile is taken, the first one to warm up."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """Something that can generate: opened runners by role, the graphs they stand for, the embedding table."""

    name: str
    runners: Mapping[str, Runner]
    graphs: GraphSet
    table: Array


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the counted rounds."""

    median_ms: float
    p90_ms: float
    p99_ms: float
    rounds: int


Samples = dict[str, list[float]]
"""Stage → milliseconds, one per round."""


def sample(
    variants: Sequence[Variant],
    pixel_values: Array,
    prompts: Sequence[Sequence[int]],
    new_tokens: int = 16,
    rounds: int = 9,
    warmup: int = 2,
    log: Log = lambda text: None,
    side: Mapping[str, Array] | None = None,
) -> dict[str, Samples]:
    """Time all variants in turn, forwards in one round and backwards in the next.

    Args:
        pixel_values: float32 [batch, frames, 3, height, width]. prompts: token ids, one prompt per row.
        new_tokens: generated per round, end-of-sequence ignored.
        side: see `Generator.reduce`; every variant takes of it what it needs.
    Returns:
        variant → its samples, in the order of the rounds.
    """
    # Nothing stops early: every round runs the same number of steps.
    generators = [Generator(v.runners, _without_eos(v.graphs), v.table) for v in variants]
    samples: dict[str, Samples] = {
        v.name: {s: [] for s in STAGES if s != "question" or s in v.graphs.files} for v in variants
    }
    for i in range(warmup + rounds):
        log(f"round {i + 1} of {warmup + rounds}")
        order = range(len(variants)) if i % 2 else reversed(range(len(variants)))
        for k in order:
            timings = generators[k].generate(pixel_values, prompts, new_tokens, side=side).timings
            if i >= warmup:
                found = samples[variants[k].name]
                found["vision"].append(timings.vision_ms)
                if "question" in found:
                    found["question"].append(timings.question_ms)
                found["reduce"].append(timings.reduce_ms)
                found["prefill"].append(timings.prefill_ms)
                found["decode"].append(float(np.median(timings.decode_ms)))
                found["ttft"].append(timings.ttft_ms)
    return samples


def layers(
    variant: Variant,
    pixel_values: Array,
    prompts: Sequence[Sequence[int]],
    new_tokens: int = 16,
    side: Mapping[str, Array] | None = None,
) -> dict[str, Sequence[Layer]]:
    """What the engines of a variant became, by their roles: "prefill and decode". Milliseconds are an answer's, where they are known.

    Args:
        variant: its runners are opened to be profiled. Others: as of `sample`.
    """
    generator = Generator(variant.runners, _without_eos(variant.graphs), variant.table)
    for _ in range(PROFILED):
        generator.generate(pixel_values, prompts, new_tokens, side=side)
    return {
        " and ".join(roles): variant.runners[roles[0]].layers(PROFILED) for roles in variant.graphs.roles().values()
    }


def timings(found: Mapping[str, Samples]) -> dict[str, dict[str, Timing]]:
    """variant → stage → timing, of what `sample` returns."""
    return {name: {stage: timing(values) for stage, values in stages.items()} for name, stages in found.items()}


def timing(values: Sequence[float]) -> Timing:
    median, p90, p99 = (float(np.percentile(values, p)) for p in (50, 90, 99))
    return Timing(median, p90, p99, len(values))


def _without_eos(graphs: GraphSet) -> GraphSet:
    return replace(graphs, text=replace(graphs.text, eos=[]))
