"""`edgetrim estimate`: what a model with reductions would take on a device, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from exporter.cli import _options as options
from exporter.cli._output import Output, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from exporter.cost.accountings._contract import Accounting
    from exporter.cost.roofline import Estimate, StageTime
    from exporter.job import Job
    from exporter.plan import Plan


@click.command()
@options.checkpoint_argument(required=False)
@options.reduce_option
@options.profiles_option
@options.frames_option
@options.image_size_option
@options.clip_model_option
@options.kv_option
@click.option("--text", type=click.IntRange(1), metavar="N", help="Prompt tokens besides the visual ones. Default: 64.")
@click.option("--new-tokens", type=click.IntRange(1), metavar="N", help="Tokens of the answer. Default: 64.")
@click.option("--power-mode", metavar="MODE", help="Power mode of the device. Default: the profile's.")
@click.option(
    "--accounting", "accounting", metavar="NAME",
    help="Reckon the language model as others do, too: `llm-viewer`.",
)  # fmt: skip
@options.json_option
def command(
    checkpoint: str,
    reductions: tuple[str, ...],
    profiles: tuple[str, ...],
    frames: int,
    image_size: tuple[int, int] | None,
    clip: str | None,
    kv: Literal["none", "int8"] | None,
    text: int | None,
    new_tokens: int | None,
    power_mode: str | None,
    accounting: str | None,
    as_json: bool,
) -> None:
    """Say what CHECKPOINT would take on a device: time, memory, energy.

    CHECKPOINT is a folder with config.json (weights are not read), a hub id, `embedded` (the default), or an output folder, whose
    reductions and profile are then taken. Times are rooflines, lower bounds: compare them with one another. Exit code 5 if it fits
    none of the profiles.
    """
    from dataclasses import replace

    from exporter.cost import roofline
    from exporter.errors import EnvironmentMismatch

    out = Output(as_json)
    jobs = _jobs(checkpoint, reductions, profiles, frames, image_size, clip, kv)
    other = None if accounting is None else _accounting(accounting)
    found: list[tuple[Plan, Estimate, Estimate | None]] = []
    with out.stage("estimate") as log:
        for job in jobs:
            log(Path(job.profile).stem)
            plan = job.plan(weights=False)
            if power_mode is not None:
                plan = replace(plan, profile=plan.profile.in_mode(power_mode))
            usual = roofline.Use.within(plan.profile.limits)
            use = roofline.Use(text or usual.text, new_tokens or usual.new_tokens)
            bare = job.unreduced().plan(weights=False) if job.reduces else None
            found.append(
                (
                    plan,
                    roofline.estimate(plan, plan.profile, use),
                    None if bare is None else roofline.estimate(bare, plan.profile, use),
                )
            )
    plan = found[0][0]
    parts: list[RenderableType] = [_headline(jobs[0], plan, found[0][1])]
    estimates = [estimate for _, estimate, _ in found]
    parts += [_comparison(estimates)] if len(found) > 1 else _single(*found[0][1:])
    data: dict[str, Any] = {
        "checkpoint": jobs[0].checkpoint,
        "reductions": plan.record(),
        "estimates": [e.record() for e in estimates],
        "unreduced": [None if bare is None else bare.record() for _, _, bare in found],
    }
    if other is not None:
        data["accounting"], shown = _by(accounting or "", other, found)
        parts += shown
    impossible = all(e.refusals for e in estimates)
    said = [text for e in estimates for text in ((*e.warnings,) if impossible else (*e.refusals, *e.warnings))]
    out.result(data, *parts, *dict.fromkeys(said))
    if impossible:
        raise EnvironmentMismatch("\n".join(text for e in estimates for text in e.refusals))


def _jobs(
    checkpoint: str, reductions: tuple[str, ...], profiles: tuple[str, ...], frames: int,
    image_size: tuple[int, int] | None, clip: str | None, kv: Literal["none", "int8"] | None,
) -> list[Job]:  # fmt: skip
    """One per profile."""
    from dataclasses import replace

    from exporter.errors import UsageError
    from exporter.job import Job
    from exporter.workspace import Workspace

    if (Path(checkpoint) / "job.json").is_file():
        job = Job.read(Workspace(Path(checkpoint)))
        if reductions or frames > 1 or image_size or clip:
            raise UsageError(
                f"{checkpoint} is an output folder, whose reductions and input are settled. Pass its checkpoint instead: {job.checkpoint}"
            )
        job = replace(job, kv=kv or job.kv)
        return [replace(job, profile=profile, folder=None) for profile in profiles] or [job]
    if not profiles:
        raise UsageError("Which device? Pass --profile, once or more. `edgetrim list profiles` shows them.")
    return [Job(checkpoint, reductions, profile, frames, image_size, clip, kv=kv) for profile in profiles]


def _headline(job: Job, plan: Plan, estimate: Estimate) -> str:
    lines = [f"{job.checkpoint} ({plan.family.model_type})", *(f"  {step.summary}" for step in plan.steps)]
    if not plan.steps:
        lines.append(f"  no reduction: all {plan.kept} visual tokens")
    lines.append(f"  a prompt of {estimate.use.text} tokens beside them, an answer of {estimate.use.new_tokens}")
    return "\n".join(lines) + "\n"


def _single(estimate: Estimate, bare: Estimate | None) -> list[RenderableType]:
    from exporter.cost.roofline import gib

    where = f"{estimate.device}, {estimate.power_mode}" if estimate.power_mode else estimate.device
    columns = ["stage", ">GFLOP", ">MB moved", ">ms", "waits for", ">J"] + ([">unreduced ms", ">"] if bare else [])
    before = {} if bare is None else {s.name: s.ms for s in bare.stages}
    names = {"reduce": "reduce and project", "decode": "per output token"}

    def row(name: str, stage: StageTime | None, ms: float | None, joule: float | None, was: float | None) -> list[Any]:
        counted = (
            ("", "", None)
            if stage is None
            else (f"{stage.flops / 1e9:,.1f}", f"{stage.moved_bytes / 1e6:,.0f}", stage.bound)
        )
        cells = [name, *counted[:2], _number(ms), counted[2] if stage else "", _number(joule)]
        return cells + ([_number(was), None if not (ms and was) else f"{was / ms:.2f}×"] if bare else [])

    rows = [row(names.get(s.name, s.name), s, s.ms, s.energy_j, before.get(s.name)) for s in estimate.stages]
    first = bare.first_token_ms if bare else None
    rows.insert(len(rows) - 1, row("to first token", None, estimate.first_token_ms, None, first))
    rows.append(row("whole answer", None, estimate.answer_ms, estimate.answer_j, bare.answer_ms if bare else None))
    time = table(
        f"Time on {where}: roofline, a lower bound", columns, rows,
        note="" if estimate.first_token_ms is not None else "The profile knows neither the device's peaks nor its bandwidth.",
    )  # fmt: skip
    held = [
        (e.name, gib(e.weight_bytes), gib(e.activation_bytes), None if e.build_bytes is None else gib(e.build_bytes))
        for e in estimate.engines
    ]
    behind = estimate.held_bytes - estimate.cache_bytes
    held += [("keys and values", "", gib(estimate.cache_bytes), ""), ("the same, behind a step", "", gib(behind), "")]
    total = f"{gib(estimate.need_bytes)} GiB" + (
        f" of {gib(estimate.have_bytes)}" if estimate.have_bytes is not None else ""
    )
    memory = table(
        f"Memory at the limits of {estimate.profile}, GiB",
        ("engine", ">weights", ">at work", ">while it is built"),
        held,
    )
    piece = f"`{estimate.largest.name}` of {estimate.largest.engine}, {gib(estimate.largest.bytes)} GiB"
    return [time, memory, f"Together {total}. The largest piece is {piece}."]


def _comparison(estimates: Sequence[Estimate]) -> RenderableType:
    from exporter.cost.roofline import gib

    decode = [next((s.ms for s in e.stages if s.name == "decode"), None) for e in estimates]
    rows = [
        (
            e.profile, e.power_mode, _number(e.first_token_ms), _number(step), _number(e.answer_ms), _number(e.answer_j),
            gib(e.need_bytes), None if e.have_bytes is None else gib(e.have_bytes),
            {True: "fits", False: "does not fit", None: None}[e.fits],
        )
        for e, step in zip(estimates, decode, strict=True)
    ]  # fmt: skip
    columns = (
        "profile", "mode", ">ms to first token", ">per output token", ">answer", ">J", ">GiB needed", ">there", "",
    )  # fmt: skip
    return table("Rooflines, lower bounds; memory at each profile's limits", columns, rows)


def _accounting(name: str) -> Accounting:
    import exporter.cost.accountings
    from exporter import _discover

    found: Accounting = _discover.load(exporter.cost.accountings, "accounting", name.replace("-", "_")).ACCOUNTING
    return found


def _by(
    name: str, other: Accounting, found: Sequence[tuple[Plan, Estimate, Estimate | None]]
) -> tuple[list[Any], list[RenderableType]]:
    """The language model by another accounting, beside ours."""
    from exporter.cost.accountings._contract import reckon

    data: list[Any] = []
    rows: list[Sequence[object]] = []
    for plan, estimate, _ in found:
        theirs = reckon(other, plan, estimate.use.text, estimate.use.new_tokens)
        data.append({"profile": estimate.profile, "name": name, "source": other.source, "stages": theirs})
        ours = {stage.name: stage for stage in estimate.stages}
        for stage in ("prefill", "decode"):
            one, two = theirs[stage], ours[stage]
            rows.append(
                (
                    estimate.profile, stage, f"{one.operations / 1e9:,.1f}", f"{two.flops / 1e9:,.1f}",
                    f"{one.moved / 1e6:,.0f}", f"{two.moved_bytes / 1e6:,.0f}", _number(one.seconds * 1e3), _number(two.ms),
                )
            )  # fmt: skip
    columns = ("profile", "stage", ">GFLOP", ">ours", ">MB moved", ">ours", ">ms", ">ours")
    return data, [table(f"The language model as {other.source} reckons it", columns, rows, note=other.differs)]


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
