"""`edgetrim tune`: which reduction, how much of it and which precision, under a budget."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from exporter.cli import _options as options
from exporter.cli._output import Output, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from exporter.tune.search import Entry, Result


class KeepType(click.ParamType[tuple[float, ...]]):
    """ "0.5,0.25" → ratios, each in (0, 1]."""

    name = "ratios"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(dict.fromkeys(float(part) for part in str(value).split(",")))
        except ValueError:
            found = ()
        if not found or not all(0 < ratio <= 1 for ratio in found):
            self.fail(f"'{value}' is no list of keep ratios, each above 0 and at most 1, as in 0.5,0.25.", param, ctx)
        return found


@click.command()
@options.checkpoint_argument()
@options.profiles_option
@click.option(
    "--methods", multiple=True, metavar="NAME,…|TEMPLATE",
    help='Methods, or one with knobs of its own: "visionzip:keep_ratio={ratio},cls=off". Repeat. Default: all that fit.',
)  # fmt: skip
@click.option(
    "--keep", type=KeepType(), default="0.5,0.25,0.125", show_default=True, metavar="RATIO,…",
    help="Shares of the visual tokens that stay.",
)  # fmt: skip
@click.option(
    "--budget", "budgets", multiple=True, required=True, metavar="KIND=N",
    help="latency=…ms, ttft=…ms, memory=…MiB or quality_drop=…points; repeat for several.",
)  # fmt: skip
@click.option(
    "--finalists", type=click.IntRange(1), default=4, show_default=True, metavar="N",
    help="Candidates of each profile that are exported and timed.",
)  # fmt: skip
@options.output_option("tuned")
@options.frames_option
@options.image_size_option
@options.clip_model_option
@options.quantizer_options
@options.kv_option
@options.questions_option
@options.threads_option
@options.rounds_option
@options.seed_option
@click.option(
    "--ray", "ray", is_flag=False, flag_value="", metavar="[ADDRESS]",
    help="Work on a Ray cluster; without an address on one of this machine's own.",
)  # fmt: skip
@options.json_option
def command(
    checkpoint: str,
    profiles: tuple[str, ...],
    methods: tuple[str, ...],
    keep: tuple[float, ...],
    budgets: tuple[str, ...],
    finalists: int,
    output: Path,
    frames: int,
    image_size: tuple[int, int] | None,
    clip: str | None,
    quantizer: str | None,
    calibration: str | None,
    kv: Literal["none", "int8"] | None,
    questions: Path | None,
    per_kind: int,
    threads: int | None,
    rounds: int,
    seed: int,
    ray: str | None,
    as_json: bool,
) -> None:
    """Search methods, keep ratios and profiles for the best reduction of CHECKPOINT under a budget.

    The cost model comes first, then more and more questions for fewer and fewer candidates, then the finalists exported and timed.
    With a budget of `quality_drop` the fastest within the budgets wins, else the one that answers best. A search that was killed goes
    on from its output folder. Exit code 3, 4 or 5 if nothing is within the accuracy, latency or memory budget.
    """
    from exporter.errors import UsageError
    from exporter.job import Job
    from exporter.tune import report, run
    from exporter.tune.budget import parse_all
    from exporter.tune.measure import Asking
    from exporter.tune.wanted import Wanted
    from exporter.tune.workers import here, on_ray
    from exporter.workspace import Workspace

    out = Output(as_json)
    if not profiles:
        raise UsageError("Which device? Pass --profile, once or more. `edgetrim list profiles` shows them.")
    wanted = Wanted(
        Job(checkpoint, (), profiles[0], frames, image_size, clip, quantizer, calibration, kv),
        tuple(dict.fromkeys(profiles)), methods, keep, parse_all(budgets), finalists,
        Asking(None if questions is None else questions.resolve(), per_kind, seed), rounds, threads,
    )  # fmt: skip
    run.check(wanted)
    with Workspace(output).locked() as work, ExitStack() as stack:
        workers = here if ray is None else stack.enter_context(on_ray(ray or None))
        with out.stage("tune") as log:
            result = run.run(wanted, work, workers, log)
        record = report.record(result, wanted)
    page = output / report.PAGE
    parts = [*_tables(result), *result.warnings]
    if result.winner is not None:
        parts.append(f"The winner: {report.command(result, wanted)}")
    out.result({**record, "page": page}, *parts, f"Page: {page}")
    result.raise_without_winner()


def _tables(result: Result) -> list[RenderableType]:
    """What was exported, with the controls that are as short; how many went when."""
    from exporter.graphset import tokens_in_words

    finished = [i for i, e in enumerate(result.entries) if e.engine]
    counts = {e.kept for i, e in enumerate(result.entries) if i in finished and e.candidate.role == "method"}
    controls = [
        i for i, e in enumerate(result.entries) if e.candidate.role == "control" and e.kept in counts and e.scores
    ]

    def row(i: int) -> tuple[object, ...]:
        e = result.entries[i]
        mark = "winner" if i == result.winner else "front" if i in result.front else e.candidate.role
        return (
            e.candidate.spec, Path(e.candidate.profile).stem, tokens_in_words(e.tokens, e.kept), _number(e.percent, 1),
            f"{e.drop:.1f} ± {e.error:.1f}" if e.drop is not None else None, *_times(e), _number(e.memory_mib, 0), mark,
        )  # fmt: skip

    columns = (
        "reduction", "profile", "tokens", ">% right", ">points lost", ">ms to first token", ">ms a whole answer", ">MiB", "",
    )  # fmt: skip
    note = "≥: a roofline, a lower bound. Controls were asked in PyTorch."
    gone = len([e for e in result.entries if e.out])
    said = f"{len(result.entries)} candidates, {gone} dropped on the way, {len(result.left_out)} do not fit; reasons are on the page."
    return [
        table(
            "Finalists, the unreduced model, and controls as short",
            columns,
            map(row, [*finished, *controls]),
            note=note,
        ),
        said,
    ]


def _times(entry: Entry) -> tuple[str | None, str | None]:
    if entry.measured:
        return f"{entry.measured.ttft_ms:.2f}", f"{entry.measured.latency_ms:.2f}"
    if entry.roofline:
        return f"≥ {entry.roofline.ttft_ms:.2f}", f"≥ {entry.roofline.latency_ms:.2f}"
    return None, None


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
