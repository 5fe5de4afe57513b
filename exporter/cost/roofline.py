"""A plan's work against a profile: time from peaks, memory from what its engines hold, and in words what does not fit.

The roofline is a lower bound. A product takes as long as its operations at the device's peak or its bytes at its bandwidth,
whichever is longer; launches, tails and what is no product cost nothing. So a ratio of two plans is worth more than a figure: what
engines were measured to take is in docs/estimate.md. No torch here but in `estimate`, which counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from exporter.cost.work import Engine, Stage, Work
from exporter.errors import EnvironmentMismatch, UsageError
from exporter.stages.build import backend_for
from profiles._schema import Limits, Memory, Profile

if TYPE_CHECKING:
    from exporter.plan import Plan

BUILD_PEAK = {"none": 3.5, "int8": 5.0, "int4": 5.0, "fp8": 5.0, "nvfp4": 5.0}
"""Memory of TensorRT while it builds, in weights of the engine. Measured with TensorRT-RTX 1.7 on decoders up to 2.4 GB; FP8 is taken
to be like INT8, NVFP4 like INT4."""

WRITTEN_OUT = {("tensorrt_rtx", "nvfp4")}
"""Where the engine writes a quantised matrix out as floats before it multiplies, in every run, one after another: TensorRT-RTX 1.7 with
NVFP4 (docs/quantisation.md#nvfp4)."""

FIRST = ("vision", "question", "reduce", "prefill")
"""What runs before the first token."""


@dataclass(frozen=True)
class Use:
    """One question: prompt tokens besides the visual ones, and tokens of the answer."""

    text: int = 64
    new_tokens: int = 64

    @classmethod
    def within(cls, limits: Limits) -> Use:
        """The usual one, or as much of it as fits."""
        return cls(min(cls.text, limits.text), min(cls.new_tokens, limits.new_tokens))


@dataclass(frozen=True)
class StageTime:
    """Of one stage; of decode, one step in the middle of the answer.

    moved_bytes: of weights, activations and the cache. compute_ms, memory_ms: all operations at the peak, all bytes at the
    bandwidth; None where the profile does not say it. ms: the longer of the two for every product, as far as known. energy_j: at the
    power mode's budget.
    """

    name: str
    flops: int
    moved_bytes: int
    compute_ms: float | None
    memory_ms: float | None
    ms: float | None
    energy_j: float | None

    @property
    def bound(self) -> str | None:
        """What it waits for, mostly; None where one of the two is not known."""
        if self.compute_ms is None or self.memory_ms is None:
            return None
        return "compute" if self.compute_ms > self.memory_ms else "memory"


@dataclass(frozen=True)
class EngineMemory:
    """What an engine holds at the profile's limits, and what building it takes where TensorRT builds it. activation_bytes: and of
    weights that are written out, see `WRITTEN_OUT`."""

    name: str
    weight_bytes: int
    activation_bytes: int
    build_bytes: int | None


@dataclass(frozen=True)
class Block:
    """The largest weight. pieces: how many it has to be split into; 1 where it fits, or nothing is known."""

    engine: str
    name: str
    bytes: int
    pieces: int


@dataclass(frozen=True)
class Estimate:
    """cache_bytes: keys, values and the tokens' places at the profile's limits, of the whole batch; held_bytes: what they take while
    it runs (`Backend.holds`). table_bytes: the embedding table, a file that is mapped, not loaded. need_bytes: weights, activations
    and what is held of the cache.
    have_bytes: the device's memory, None where it is not known. refusals: why it cannot run; warnings: what has to be done.
    """

    profile: str
    device: str
    power_mode: str | None
    use: Use
    visual_tokens: int
    stages: tuple[StageTime, ...]
    first_token_ms: float | None
    answer_ms: float | None
    answer_j: float | None
    engines: tuple[EngineMemory, ...]
    cache_bytes: int
    held_bytes: int
    table_bytes: int
    need_bytes: int
    have_bytes: int | None
    largest: Block
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """None where the device's memory is not known."""
        return None if self.have_bytes is None else not self.refusals

    def check(self) -> None:
        """Raises EnvironmentMismatch if it cannot run on the device."""
        if self.refusals:
            raise EnvironmentMismatch(" ".join(self.refusals))

    def record(self) -> dict[str, Any]:
        """As data, with what follows from it."""
        bounds = [{**asdict(stage), "bound": stage.bound} for stage in self.stages]
        return {**asdict(self), "stages": bounds, "fits": self.fits}


def estimate(plan: Plan, profile: Profile, use: Use | None = None) -> Estimate:
    """What the plan would cost with another profile, or its own. Reads no weights and writes nothing.

    Raises:
        UsageError: more tokens than the profile's limits. CheckpointError: see `count.count`.
    """
    use = use or Use.within(profile.limits)
    return against(replace(plan, profile=profile), work_of(plan, profile, use), use)


def foresee(plan: Plan) -> Estimate | None:
    """The plan's estimate where there is something to compare it with: the profile knows the device's memory."""
    return None if plan.profile.memory == Memory() else estimate(plan, plan.profile)


def work_of(plan: Plan, profile: Profile, use: Use) -> Work:
    """What there is to do and to hold. Of the profile only precision and limits matter, not the device."""
    from exporter.cost.count import Load, count

    limits = profile.limits
    for name, asked, allowed in (
        ("text", use.text, limits.text),
        ("new_tokens", use.new_tokens, limits.new_tokens),
    ):
        if asked > allowed:
            raise UsageError(
                f"Profile `{profile.name}` allows {name} = {allowed}, and {asked} is asked for. Ask for less, or raise `{name}` "
                "under [limits] in a profile of your own."
            )
    most = Load(limits.batch, limits.text, limits.new_tokens)
    return count(replace(plan, profile=profile), Load(1, use.text, use.new_tokens // 2), most)


def against(plan: Plan, work: Work, use: Use) -> Estimate:
    """The work of `plan`, set against its profile."""
    profile = plan.profile
    memory = profile.memory
    stages = tuple(_time(stage, profile) for stage in work.stages if stage.operators)
    by_name = {stage.name: stage for stage in stages}
    first = _sum([s.ms for s in stages if s.name in FIRST])
    answer = None if first is None else _sum([first, *[by_name["decode"].ms] * (use.new_tokens - 1)])
    engines = tuple(_memory(engine, profile) for engine in work.engines if engine.weight_bytes)
    spec = plan.family.decoder(plan.checkpoint)
    each = 4 if profile.precision.compute == "fp32" else 2
    held = backend_for(profile).holds(work.cache)
    need = sum(e.weight_bytes + e.activation_bytes for e in engines) + held
    have = memory.usable_mib or memory.total_mib
    widest = max(work.engines, key=lambda engine: engine.largest_bytes)
    largest = Block(
        widest.name, widest.largest, widest.largest_bytes, pieces(widest.largest_bytes, memory.largest_block_mib)
    )
    found = Estimate(
        profile.name, profile.device.title, profile.mode_name, use, plan.kept, stages, first, answer,
        _energy(answer, profile), engines, sum(work.cache), held, spec.vocab * spec.hidden * each, need, None if have is None else have * 2**20,
        largest, (), (),
    )  # fmt: skip
    return replace(found, refusals=tuple(_refusals(found)), warnings=tuple(_warnings(found, profile)))


def pieces(size: int, largest_mib: int | None) -> int:
    """How many parts an allocation of `size` bytes has to be split into for a device that gives `largest_mib` in one piece;
    None: it gives all it has."""
    return 1 if largest_mib is None else ceil(size / (largest_mib * 2**20))


def _time(stage: Stage, profile: Profile) -> StageTime:
    mode, compute = profile.mode, profile.precision.compute
    peak = mode.fp32_tflops if compute == "fp32" else mode.fp16_tflops
    bandwidth = mode.bandwidth_gb_s
    fused = profile.stack.module is not None  # TensorRT fuses attention; ONNX Runtime's CPU writes its scores
    moved = total = flops_ms = bytes_ms = 0.0
    for op in stage.operators:
        size = op.weight_bytes + op.moved_bytes + (0 if fused else op.score_bytes)
        here = 0.0 if peak is None else op.flops / peak / 1e9
        there = 0.0 if bandwidth is None else size / bandwidth / 1e6
        moved += op.count * size
        flops_ms, bytes_ms = flops_ms + op.count * here, bytes_ms + op.count * there
        total += op.count * max(here, there)
    ms = None if peak is None and bandwidth is None else total
    return StageTime(
        stage.name, stage.flops, int(moved), None if peak is None else flops_ms, None if bandwidth is None else bytes_ms,
        ms, _energy(ms, profile),
    )  # fmt: skip


def _energy(ms: float | None, profile: Profile) -> float | None:
    power = profile.mode.power_w
    return None if ms is None or power is None else ms / 1000 * power


def _sum(parts: list[float | None]) -> float | None:
    return None if any(part is None for part in parts) else sum(part for part in parts if part is not None)


def _memory(engine: Engine, profile: Profile) -> EngineMemory:
    factor = BUILD_PEAK["none"]
    if {"prefill", "decode"} & set(engine.roles):
        factor = BUILD_PEAK.get(profile.precision.weights, factor)
    build = None if profile.stack.module is None else int(factor * engine.weight_bytes)
    scratch = engine.widest_bytes if _writes_out(profile) else 0
    return EngineMemory(engine.name, engine.weight_bytes, engine.activation_bytes + scratch, build)


def _writes_out(profile: Profile) -> bool:
    return (profile.stack.module, profile.precision.weights) in WRITTEN_OUT


def _refusals(found: Estimate) -> list[str]:
    if found.have_bytes is None or found.need_bytes <= found.have_bytes:
        return []
    weights = sum(e.weight_bytes for e in found.engines)
    activations = sum(e.activation_bytes for e in found.engines)
    alone = next((e.weight_bytes for e in found.engines if e.name == "decode"), 0)
    if alone and found.need_bytes - alone <= found.have_bytes:
        hint = (
            "Something is dropped inside the language model, so prefill and decode are engines of their own, with its weights in "
            "both: reduce before it instead."
        )
    elif weights > found.have_bytes:
        hint = "Take INT4 weights, a smaller model or a larger device."
    else:
        hint = "Keep fewer visual tokens, or lower `text`, `new_tokens` or `batch` under [limits] in a profile of your own."
    return [
        f"Profile `{found.profile}`: does not fit. The engines need {gib(found.need_bytes)} GiB at the profile's limits (weights "
        f"{gib(weights)}, activations {gib(activations)}, keys and values, before and behind a step, {gib(found.held_bytes)}), {found.device} has "
        f"{gib(found.have_bytes)}. {hint}"
    ]


def _warnings(found: Estimate, profile: Profile) -> list[str]:
    said = []
    block = profile.memory.largest_block_mib
    if found.largest.pieces > 1:
        what = "LM head" if "lm_head" in found.largest.name else f"`{found.largest.name}` of {found.largest.engine}"
        said.append(
            f"{what} needs {gib(found.largest.bytes)} GiB in one piece, {found.device} gives {gib((block or 0) * 2**20)}: split in "
            f"{found.largest.pieces}."
        )
    for engine in found.engines:
        if pieces(engine.activation_bytes, block) > 1:
            said.append(
                f"Activations of {engine.name} take {gib(engine.activation_bytes)} GiB at the profile's limits, in one piece, "
                f"{found.device} gives {gib((block or 0) * 2**20)}: lower `text` or `batch` under [limits] in a profile of your own."
            )
    if _writes_out(profile):
        said.append(
            f"Profile `{found.profile}`: TensorRT-RTX writes every NVFP4 matrix out as FP16 before it multiplies, so that a token takes "
            "longer than its roofline. INT4 weights do not; FP8 weights are nearer to the model."
        )
    worst = max(found.engines, key=lambda e: e.build_bytes or 0)
    build = worst.build_bytes or 0
    shared = (
        profile.stack.jetpack is not None
    )  # else the host's memory, of which nothing is known, is what a build takes
    if shared and found.have_bytes is not None and build > found.have_bytes:
        said.append(
            f"Building {worst.name} takes about {gib(build)} GiB ({build / worst.weight_bytes:.1f} × its weights), {found.device} "
            f"has {gib(found.have_bytes)}: give it swap."
        )
    return said


def gib(size: float) -> str:
    """Bytes in GiB, as text: "1.02", or "0.004"."""
    found = size / 2**30
    return f"{found:.2f}" if found >= 0.1 else f"{found:.1g}"
