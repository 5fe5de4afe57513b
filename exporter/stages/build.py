"""build: graphs → engines of the profile's backend. No torch from here on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import exporter.backends
from exporter import _discover
from exporter._typed import typed
from exporter.backends._contract import Axis, Backend, EngineRecord, Range, ShapeProfile
from exporter.errors import EnvironmentMismatch, VerificationError
from exporter.graphset import GraphSet, bucket_role
from profiles._schema import Limits, Profile

DECODE_STEP = Range(1, 1, 4)
"""Tokens per decode step. Never a fixed 1: TensorRT would then store FP16 weights a second time beside prefill's."""

TURN = "turn"
"""Name of the shapes of a conversation's next turn: text behind a cache."""

Log = Callable[[str], None]


def backend_for(profile: Profile) -> Backend:
    found: Backend = _discover.load(exporter.backends, "backend", profile.stack.backend).BACKEND
    return found


def options_for(profile: Profile) -> dict[str, Any]:
    """What the profile's stack asks of its backend."""
    stack = profile.stack
    options: dict[str, Any] = {}
    if stack.module is not None:
        options["module"] = stack.module
    if stack.module == "tensorrt_rtx" and stack.compute_capabilities:
        options["compute_capabilities"] = list(stack.compute_capabilities)
    return options


def why_not_here(profile: Profile) -> str | None:
    """None, or why this profile's engines have to be built on the device itself."""
    if missing := backend_for(profile).missing():
        return missing
    if profile.stack.builds_on_device:
        from exporter.backends import _cuda

        return _cuda.missing()
    return None


def build(
    graphs: GraphSet,
    source: Path,
    out: Path,
    profile: Profile,
    log: Log = lambda text: None,
    strip_weights: bool = False,
) -> list[EngineRecord]:
    """Build one engine per graph file.

    Args:
        source: the folder with the graphs. out: where engines go. strip_weights: leave the weights with the graphs.
    Raises:
        EnvironmentMismatch: this profile cannot be built here. ExportError: the backend refused a graph.
    """
    if reason := why_not_here(profile):
        raise EnvironmentMismatch(
            f"Profile `{profile.name}` cannot be built on this machine: {reason.rstrip('.')}. Copy the folder to the device and run "
            f"`edgetrim build` there; the graphs are the same."
        )
    backend = backend_for(profile)
    options = options_for(profile) | ({"strip_weights": True} if strip_weights else {})
    records = []
    for file, roles in graphs.roles().items():
        log(f"building {', '.join(roles)}")
        shapes = shape_profiles(roles, graphs, profile.limits)
        records.append(backend.build(source / built_from(file, graphs, profile), roles, shapes, out, options, log))
    return records


def built_from(file: str, graphs: GraphSet, profile: Profile) -> str:
    """The file that a graph's engine is built from: the one with plugins, where the profile wants them."""
    return graphs.plugged.get(file, file) if profile.stack.plugins else file


def shape_profiles(roles: Sequence[str], graphs: GraphSet, limits: Limits) -> list[ShapeProfile]:
    """Those of the engine that plays these roles: one each, and where it decodes, one for the text of a conversation's next turn."""
    also = [TURN] if "decode" in roles else []
    return [shape_profile(role, graphs, limits) for role in (*roles, *also)]


def shape_profile(role: str, graphs: GraphSet, limits: Limits) -> ShapeProfile:
    """Tight ranges of one role's inputs, or of a turn's, from what the profile allows."""
    batch, text = Range(1, 1, limits.batch), Range(1, min(32, limits.text), limits.text)
    if role == "vision":
        image, frames = graphs.image, graphs.visual.frames
        return ShapeProfile(role, {"pixel_values": (batch, frames, 3, image.height, image.width)})
    if role == "question":
        return ShapeProfile(role, {"question_ids": (batch, graphs.question_tokens)})
    if role == "reduce":
        signals = {name: shape for name, shape in graphs.signals.items() if name not in graphs.for_prefill}
        inputs: dict[str, tuple[Axis, ...]] = {name: (batch, *shape) for name, shape in signals.items()}
        for name, side in graphs.side.items():
            inputs[name] = (batch, *(axis if isinstance(axis, int) else text for axis in side))
        return ShapeProfile(role, inputs)
    for number, kept in enumerate([graphs.text.kept[-1], *(kept for _, kept in graphs.buckets[:-1])]):
        if graphs.buckets and role == bucket_role(number):
            return ShapeProfile(role, _bucket_inputs(kept, graphs, limits, batch))
    return ShapeProfile(role, _llm_inputs(role, graphs, limits, batch, text))


def _bucket_inputs(kept: int, graphs: GraphSet, limits: Limits, batch: Range) -> Mapping[str, tuple[Axis, ...]]:
    spec, past = graphs.text, _past(False, kept, limits)
    last = len(spec.kept) - 1
    inputs: dict[str, tuple[Axis, ...]] = {
        "attention_row": (batch, _past(False, spec.kept[last - 1], limits)),
        "kept": (batch, kept),
    }
    cache = graphs.cache().items()
    return inputs | {
        n: (batch, *(past if d is None else d for d in shape)) for n, (group, shape) in cache if group == last
    }


def _llm_inputs(
    role: str, graphs: GraphSet, limits: Limits, batch: Range, text: Range
) -> Mapping[str, tuple[Axis, ...]]:
    spec = graphs.text
    prefill = role == "prefill"
    kept = graphs.visual.kept
    prompt = Range(kept + text.min, kept + text.opt, kept + text.max)
    seq = {"prefill": prompt, TURN: turn(graphs, limits)}.get(role, DECODE_STEP)
    axes = (spec.position_axes,) if spec.position_axes > 1 else ()
    inputs: dict[str, tuple[Axis, ...]] = {
        "inputs_embeds": (batch, seq, spec.width),
        "position_ids": (*axes, batch, seq),
        "order": (batch, seq),
        **({"reach": (batch, seq)} if graphs.reaches else {}),
        **({"size": (batch, seq)} if graphs.sized else {}),
    }
    if prefill and graphs.prefill_apart:
        return inputs | {name: (batch, *graphs.signals[name]) for name in graphs.for_prefill}
    for name, (group, shape) in graphs.cache().items():
        past = _past(prefill, spec.kept[group], limits)
        inputs[name] = (batch, *(past if d is None else d for d in shape))
    if graphs.buckets:
        inputs["past_starts"] = (batch, 3)
    if graphs.state:
        inputs["past_state"] = (batch, graphs.state)
    return inputs


def turn(graphs: GraphSet, limits: Limits) -> Range:
    """Tokens of a turn that run at once: as many as there may be, unless their mask over the longest cache would be larger than a
    prompt's, and with it the engine's scratch memory. The runner takes the rest in further pieces."""
    prompt = graphs.visual.kept + limits.text
    past = max(graphs.text.kept) + limits.text + limits.new_tokens
    fitting = int((math.sqrt(past**2 + 4 * prompt**2) - past) / 2)  # the largest s with s (s + past) <= prompt²
    most = max(DECODE_STEP.max, min(limits.text, fitting))
    return Range(1, min(32, most), most)


def _past(prefill: bool, kept: int, limits: Limits) -> Range | int:
    if prefill:
        return 0
    return Range(1, kept + min(64, limits.text), kept + limits.text + limits.new_tokens)


def record_json(records: list[EngineRecord]) -> list[dict[str, Any]]:
    return [asdict(r) for r in records]


def load_records(data: Any, where: Path) -> list[EngineRecord]:
    try:
        return typed(list[EngineRecord], data)
    except ValueError as e:
        raise VerificationError(f"{where} cannot be read ({e}). Run build again.") from e
