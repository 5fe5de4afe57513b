"""`edgetrim bench`: latency per stage, with and without reduction; and the latency gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli import _ci
from exporter.cli import _options as options
from exporter.cli._output import Output

if TYPE_CHECKING:
    from exporter.stages.check import Check, Setting, Subject


@click.command()
@options.folder_argument
@options.rounds_option
@click.option(
    "--new-tokens", type=click.IntRange(2), default=16, show_default=True, metavar="N", help="Tokens generated a round."
)
@click.option(
    "--compare/--no-compare",
    default=True,
    show_default=True,
    help="Also time PyTorch, and the unreduced model in both runtimes.",
)
@options.threads_option
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Gate: is FOLDER slower than this other bundle? Both are timed in turn.",
)  # fmt: skip
@click.option("--check", is_flag=True, help="Gate: is FOLDER slower than its stored baseline?")
@click.option(
    "--save-baseline", is_flag=True, help="Store this start with the baseline, unless --check finds it slower."
)
@options.baselines_option
@click.option(
    "--sessions", type=click.IntRange(5), default=20, show_default=True, metavar="N",
    help="With --against: most times that both are opened.",
)  # fmt: skip
@click.option("--apart", is_flag=True, help="With --against: open one at a time, if memory does not hold both.")
@click.option("--strict", is_flag=True, help="Fail also if the gate cannot tell.")
@_ci.ci_options
@options.json_option
def command(
    folder: Path,
    rounds: int,
    new_tokens: int,
    compare: bool,
    threads: int | None,
    against: Path | None,
    check: bool,
    save_baseline: bool,
    baselines: Path,
    sessions: int,
    apart: bool,
    strict: bool,
    junit: Path | None,
    annotations: str | None,
    as_json: bool,
) -> None:
    """Time every stage of FOLDER: vision, reduction, prefill, decode.

    All variants run in one process, in turn, so that what disturbs the machine disturbs all alike.

    With --against, --check or --save-baseline FOLDER is only read. Exit code 4 if a stage is slower than the profile's gates
    allow; docs/gate.md explains the verdicts.
    """
    from exporter.errors import UsageError

    out = Output(as_json)
    if against is None and not check and (strict or junit or annotations):
        raise UsageError("--strict, --junit and --annotations go with --check or --against.")
    if against is None and apart:
        raise UsageError("--apart goes with --against.")
    if against is None and not check and not save_baseline:
        return _bench(out, folder, rounds, new_tokens, threads, compare)
    if against is not None and (check or save_baseline):
        raise UsageError("--against compares with a bundle, --check and --save-baseline with what is stored: choose.")
    from exporter.stages.check import Setting, Subject

    with out.stage("read the bundle"):
        subject = Subject.of(folder)
    setting = Setting(threads, new_tokens)
    if against is not None:
        checked = _against(out, subject, against, setting, sessions, apart)
    else:
        found = _stored(out, subject, setting, baselines, check, save_baseline)
        if found is None:
            return None
        checked = found
    return _verdict(out, subject, checked, strict, junit, annotations)


def _bench(out: Output, folder: Path, rounds: int, new_tokens: int, threads: int | None, compare: bool) -> None:
    from exporter import pipeline
    from exporter.cli import _results
    from exporter.graphset import GraphSet
    from exporter.job import Job
    from exporter.workspace import Workspace

    with Workspace(folder).locked() as work:
        job = Job.read(work)
        with out.stage("bench") as log:
            record = pipeline.run_bench(work, rounds, new_tokens, threads, compare, log)
        headline = _results.headline(job, GraphSet.load(work.graphs))
    out.result({"folder": folder, **record}, headline, *_results.latency(record))


def _against(out: Output, subject: Subject, against: Path, setting: Setting, sessions: int, apart: bool) -> Check:
    from exporter.errors import UsageError
    from exporter.stages import check

    if not against.is_dir():
        raise UsageError(f"There is no folder {against} to compare with.")
    with out.stage("compare in turn") as log:
        return check.against(subject, check.Subject.of(against), setting, sessions, apart, log)


def _stored(out: Output, subject: Subject, setting: Setting, folder: Path, check_it: bool, save: bool) -> Check | None:
    """Time one start; compare it with what is stored, store it, or both. None if there is nothing to judge."""
    from exporter import baselines
    from exporter.cli import _gates
    from exporter.stages import check

    name = subject.profile.name
    if check_it:
        baselines.of_model(folder, name, subject.model())  # before anything is timed
    with out.stage("bench") as log:
        session, executed = check.start(subject, setting, log)
    conditions = check.conditions(subject, setting, executed)
    path = baselines.Baseline(name, conditions).path(folder)
    if check_it:
        path, baseline = baselines.find(folder, name, conditions)
    else:
        baseline = baselines.load(path) if path.is_file() else baselines.Baseline(name, conditions)
    checked = None
    if check_it:
        limit = subject.profile.gates.latency_slowdown_max / 100
        checked = check.stored(session, baseline.generations, limit, str(path), executed)
    if save and (checked is None or checked.verdict != "slower"):
        kept = baseline.with_session(subject.bundle, session)
        kept.save(folder)
        if checked is None:
            out.result(*_gates.saved(path, kept))
        else:
            out.note(f"Stored with {path}.")
    return checked


def _verdict(
    out: Output, subject: Subject, checked: Check, strict: bool, junit: Path | None, annotations: str | None
) -> None:
    """Print, tell the CI system, and fail if the gate does."""
    from exporter.cli import _gates
    from exporter.errors import LatencyError

    cases = _gates.latency_cases(checked)
    out.result(*_gates.check(subject.folder, checked))
    _ci.tell(out, subject.profile.name, cases, junit, annotations)
    failed = [f"{c.name}: {c.message}" for c in cases if c.outcome == "failed" or (strict and c.outcome == "undecided")]
    if failed:
        raise LatencyError(f"{subject.folder} does not pass the latency gate: {'; '.join(failed)}.")
    for case in cases:
        if case.outcome == "undecided":
            out.warn(f"{case.name}: {case.message}.")
