"""The stages in order: export → build → validate → bench → pack. Each reads what the one before left on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter import __version__
from exporter._typed import typed
from exporter.bundle import MANIFEST, SCHEMA, SIGNATURE, Bundle, contents
from exporter.engines import open_runners, runnable_engines
from exporter.errors import EnvironmentMismatch, ExportError, GateError, UsageError
from exporter.graphset import GraphSet
from exporter.job import JOB, Job, folder_of
from exporter.stages._inputs import calibration_for, questions_for, synthetic
from exporter.workspace import Workspace

if TYPE_CHECKING:
    from exporter.backends._contract import EngineRecord

Log = Callable[[str], None]
Stage = Callable[[str], AbstractContextManager[Log]]
ESTIMATE = "evidence/estimate.json"
"""What export foresaw; only of profiles that know their device's memory."""


def silent(text: str) -> None:
    """The default log."""


def unseen(title: str) -> AbstractContextManager[Log]:
    """The default context around a stage."""
    return nullcontext(silent)


def run_export(job: Job, work: Workspace, log: Log = silent, warn: Log = silent) -> GraphSet:
    """Export into the workspace. What a killed export of the same had finished is kept. Later stages' results, which no longer
    belong to these graphs, are removed.

    Args:
        warn: told, before anything is done, what will not fit the profile's device.
    """
    from exporter.cost.roofline import foresee
    from exporter.journal import JOURNAL
    from exporter.stages import recipe
    from exporter.stages.export import export

    plan = job.plan()
    calibration = calibration_for(job, plan)
    foreseen = foresee(plan)
    for text in () if foreseen is None else (*foreseen.refusals, *foreseen.warnings):
        warn(text)
    with work.resumed("graphs", JOURNAL) as folder:
        graphs = export(plan, folder, log, calibration)
        # Before the new graphs take their place: a kill in between leaves no job, never the old one's with other graphs.
        _forget(work, MANIFEST, JOB, "engines", "evidence", "report.html", recipe.RECIPE, recipe.PAGE)
    if foreseen is not None:
        work.write(ESTIMATE, json.dumps(foreseen.record(), indent=1, ensure_ascii=False) + "\n")
    job.save(work)
    return graphs


def check_graphs(work: Workspace, warn: Log = silent) -> None:
    """Refuse graphs that the profile's target would refuse or get wrong, as far as there is a table of it.

    Args:
        warn: told what the target takes, but runs slowly.
    Raises:
        EnvironmentMismatch: names the nodes. The graphs stay.
    """
    from exporter.lint._check import in_words, lint
    from exporter.lint._table import table_for

    profile = Job.read(work).loaded_profile()
    table = table_for(profile.stack)
    if table is None:
        return
    graphs = GraphSet.load(work.graphs)
    files = [graphs.plugged.get(file, file) if profile.stack.plugins else file for file in graphs.roles()]
    findings = [finding for file in files for finding in lint(work.graphs / file, table)]
    for text in in_words([finding for finding in findings if not finding.fatal]):
        warn(text)
    if fatal := [finding for finding in findings if finding.fatal]:
        raise EnvironmentMismatch(
            f"{table.name}, which profile `{profile.name}` is for, would not run these graphs:\n"
            + "\n".join(in_words(fatal))
            + f"\nThe graphs are in {work.graphs}; `edgetrim lint {work.folder}` says this again."
        )


def run_build(work: Workspace, log: Log = silent, strip_weights: bool = False) -> list[EngineRecord]:
    """Build engines; of a bundle, if it is what its manifest says.

    Args:
        strip_weights: build engines without weights; whoever opens them takes those of the graphs.
    Raises:
        EnvironmentMismatch: the profile's engines are the device's to build, or do not fit it. VerificationError: the bundle was changed.
    """
    from exporter.stages import build, recipe

    if (work.folder / MANIFEST).is_file():
        Bundle.open(work.folder)
    job = Job.read(work)
    refuse_what_does_not_fit(work)
    graphs = GraphSet.load(work.graphs)
    with work.fresh("engines") as folder:
        records = build.build(graphs, work.graphs, folder, job.loaded_profile(), log, strip_weights)
        (folder / "engines.json").write_text(json.dumps(build.record_json(records), indent=1) + "\n")
        _forget(work, MANIFEST, recipe.RECIPE, recipe.PAGE)  # before: a manifest never names others
    return records


def refuse_what_does_not_fit(work: Workspace) -> None:
    """Raises EnvironmentMismatch with what export foresaw."""
    if (work.folder / ESTIMATE).is_file():
        found = work.read_json(ESTIMATE, "Run `edgetrim export` again.")
        try:
            said = [text for text in typed(list[str], found["refusals"]) if text.strip()]
        except (KeyError, TypeError, ValueError) as e:
            raise ExportError(
                f"{work.folder / ESTIMATE} is damaged ({type(e).__name__}: {e}). Run `edgetrim export` again."
            ) from e
        if said:
            raise EnvironmentMismatch(" ".join(said))


def run_validate(
    work: Workspace, questions: Path | None = None, per_kind: int = 200, threads: int | None = None, log: Log = silent
) -> dict[str, Any]:
    """Fidelity and quality; writes evidence/validation.json and returns it. Answers that a killed run had are not asked again.

    Raises:
        GateError: a gate did not pass. The evidence is written first.
    """
    from exporter.runtime import images
    from exporter.runtime.generate import Generator
    from exporter.runtime.prompt import Prompt
    from exporter.stages import _answers, _recorded, regressions, validate

    job = Job.read(work)
    plan = job.plan()
    asked = questions_for(job, questions, per_kind)
    notes = []
    if not asked:
        notes.append("quality: no labelled questions for this checkpoint; pass --questions FILE.jsonl")
    with open_runners(work.folder, plan.profile, threads) as (runners, graphs, table, what):
        samples = asked[:: max(1, len(asked) // 24)][:24]
        if samples:
            prompt = Prompt.of(work.graphs, graphs)
            pixels = [images.preprocess(q.frames, graphs.image) for q in samples]
            prompts = [prompt.ask(q.question, graphs.visual.placeholders, graphs.visual.media) for q in samples]
            sides = [prompt.side([q.question]) for q in samples]
        else:
            prompt = None
            pixels, prompts, sides = synthetic(work, graphs)
            notes.append("fidelity: measured on synthetic images and random token ids")
        log("comparing stages with PyTorch")
        gates = plan.profile.gates
        _forget(work, MANIFEST)
        work.evidence.mkdir(exist_ok=True)
        record_to = work.folder / _recorded.FILE
        fidelity = validate.compare(plan, runners, graphs, table, pixels, prompts, gates, sides=sides, record=record_to)
        told: list[validate.Asked] = []
        worse: dict[str, Any] = {}
        _forget(work, regressions.ANSWERS, regressions.PICTURES)
        if asked and prompt is not None:
            told = validate.ask_all(plan, runners, graphs, table, prompt, asked, work, what, log)
            log("collecting what got worse")
            worse = regressions.write(work, told, asked, Generator(runners, graphs, table), prompt)
    quality = [a.accuracy(asked) for a in told]
    met = validate.quality_gates(told, gates)
    failed = validate.verdict(fidelity, met)
    found = validate.Validation(fidelity, quality, failed, notes, validate.samples(asked, told), met, worse)
    record = {"executed": what, "questions": len(asked), **found.record()}
    work.write("evidence/validation.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    _forget(work, _answers.FOLDER)
    if failed:
        raise GateError(f"{len(failed)} gate(s) of profile `{plan.profile.name}` did not pass: {'; '.join(failed)}.")
    return record


def run_validate_recorded(work: Workspace, threads: int | None = None, log: Log = silent) -> dict[str, Any]:
    """Fidelity alone, against what PyTorch gave where the model was exported: needs neither PyTorch nor the checkpoint.

    Writes evidence/validation.json and returns it; quality stays what was measured there.

    Raises:
        GateError: a gate did not pass. The evidence is written first.
    """
    from exporter.stages import _recorded, report, validate

    job = Job.read(work)
    profile = job.loaded_profile()
    samples = _recorded.load(work.folder / _recorded.FILE)
    before = report.optional(work, "evidence/validation.json") or {}
    log(f"comparing stages with {len(samples)} recorded sample(s)")
    with open_runners(work.folder, profile, threads) as (runners, graphs, table, what):
        fidelity = validate.compare_recorded(samples, runners, graphs, table, profile.gates)
    failed = validate.verdict(fidelity, [])
    notes = [
        f"fidelity: measured against outputs of PyTorch that were recorded for {len(samples)} sample(s) at export",
        *(["quality: measured where the model was exported"] if before.get("quality") else []),
    ]
    unasked: dict[str, Any] = {"questions": 0, "quality": [], "samples": [], "gates": [], "regressions": {}}
    record = {**unasked, **before, "executed": what, "recorded": True}
    record |= {"fidelity": [asdict(row) for row in fidelity], "failed": failed, "notes": notes}
    _forget(work, MANIFEST)
    work.write("evidence/validation.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if failed:
        raise GateError(f"{len(failed)} gate(s) of profile `{profile.name}` did not pass: {'; '.join(failed)}.")
    return record


def run_bench(
    work: Workspace,
    rounds: int = 9,
    new_tokens: int = 16,
    threads: int | None = None,
    compare: bool = True,
    log: Log = silent,
) -> dict[str, Any]:
    """Latency per stage; writes evidence/latency.json and returns it. Into evidence/layers.json goes what the engines became.

    Args:
        compare: also time the PyTorch reference, and both without reduction (exported to a scratch folder for this).
    """
    import numpy as np

    from exporter import device
    from exporter.stages import bench

    job = Job.read(work)
    profile = job.loaded_profile()
    with ExitStack() as stack:
        runners, graphs, table, what = stack.enter_context(open_runners(work.folder, profile, threads))
        variants = [bench.Variant("engine_reduced" if job.reduces else "engine_unreduced", runners, graphs, table)]
        if compare:
            from exporter.stages._reference import reference

            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            plan = job.plan()
            variants.append(bench.Variant(variants[0].name.replace("engine", "reference"), *reference(plan)))
            if job.reduces:
                bare = job.unreduced()
                log("exporting the unreduced model to compare with")
                scratch = stack.enter_context(work.fresh_scratch("unreduced"))
                run_export(bare, Workspace(scratch))
                if runnable_engines(work.folder, graphs, profile):
                    run_build(Workspace(scratch), log)
                theirs = stack.enter_context(open_runners(scratch, profile, threads))
                variants.append(bench.Variant("engine_unreduced", *theirs[:3]))
                variants.append(bench.Variant("reference_unreduced", *reference(bare.plan())))
        pixels, prompts, sides = synthetic(work, graphs, 1)
        taken = bench.sample(variants, np.asarray(pixels[0]), prompts, new_tokens, rounds, log=log, side=sides[0])
    log("profiling layers")
    with open_runners(work.folder, profile, threads, profiled=True) as (runners, graphs, table, what):
        opened = bench.Variant("profiled", runners, graphs, table)
        layers = bench.layers(opened, np.asarray(pixels[0]), prompts, new_tokens, sides[0])
    record = {
        "executed": what,
        "machine": device.machine(),
        "facts": device.facts(),
        "state": device.state(),
        "versions": device.versions(),
        "threads": threads,
        "rounds": rounds,
        "new_tokens": new_tokens,
        "visual_tokens": {"before": graphs.visual.total, "kept": graphs.visual.kept},
        "variants": {
            name: {stage: asdict(t) for stage, t in stages.items()} for name, stages in bench.timings(taken).items()
        },
    }
    _forget(work, MANIFEST, bench.LAYERS)
    work.write("evidence/latency.json", json.dumps(record, indent=1) + "\n")
    told = {
        "executed": what,
        "new_tokens": new_tokens,
        "engines": {k: [asdict(r) for r in v] for k, v in layers.items()},
    }
    work.write(bench.LAYERS, json.dumps(told) + "\n")
    return record


def run_pack(work: Workspace, key: Path | None = None, layouts: Sequence[str] = ()) -> Bundle:
    """Write the report, a build recipe where there are no engines, and the manifest: the folder is a bundle from then on.

    The same folder gives the same bytes.

    Args:
        key: an OpenSSH key to sign the manifest with. layouts: of other runtimes, written beside the graphs.
    Raises:
        UsageError: there is no such layout, or its runtime has no place for something of this model. A bundle stays what it was.
    """
    from exporter import device, signature
    from exporter.layouts._write import made, write
    from exporter.stages import recipe
    from exporter.stages.report import write_report

    job = Job.read(work)
    graphs = GraphSet.load(work.graphs)
    wanted = [made(name, graphs, work.graphs, job.loaded_profile()) for name in layouts]
    _forget(work, MANIFEST, SIGNATURE)
    work.forget_unfinished()
    for layout in wanted:
        write(layout, work.graphs)
    write_report(work, job)
    if not (work.engines / "engines.json").is_file():
        recipe.write(work, graphs, job.loaded_profile())
    files = contents(work.folder)
    manifest = {
        "schema": SCHEMA,
        "edgetrim": __version__,
        "checkpoint": job.checkpoint,
        "clip": job.clip,
        "family": graphs.family,
        "profile": job.loaded_profile().name,
        "reductions": [{k: r[k] for k in ("name", "place", "spec", "before", "after")} for r in graphs.reductions],
        "visual_tokens": {"before": graphs.visual.total, "kept": graphs.visual.kept},
        "precision": {"compute": graphs.compute, "weights": graphs.weights},
        "opset": 21,
        "versions": device.versions(),
        "evidence": sorted(n for n in files if n.startswith("evidence/")),
        "engines": sorted(n for n in files if n.startswith("engines/") and n.endswith(".engine")),
        "files": files,
    }
    work.write(MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    if key is not None:
        signature.sign(work.folder / MANIFEST, key, work.folder / SIGNATURE)
    return Bundle.open(work.folder, verify=False)


def exported(work: Workspace, job: Job) -> bool:
    """Whether the workspace already holds this very job's graphs: the profile counts by what it says."""
    try:
        found = Job.read(work)
        same = found.loaded_profile() == job.loaded_profile() and replace(found, profile=job.profile) == job
        return same and (work.graphs / "graphs.json").is_file()
    except (UsageError, ExportError):
        return False


def why_recorded(job: Job) -> str | None:
    """None, or why PyTorch cannot be compared with here, so that what it gave at export has to do."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        return "PyTorch is not installed here"
    try:
        folder_of(job.checkpoint)
    except ExportError as e:
        return str(e)
    return None


def run(
    job: Job, work: Workspace, questions: Path | None = None, per_kind: int = 200, rounds: int = 9, threads: int | None = None,
    stage: Stage = unseen, warn: Log = silent,
) -> Bundle:  # fmt: skip
    """All stages. What is already on disk for the same job is kept.

    Args:
        stage: opens a context around a stage that yields its log (as `Output.stage` does).
        warn: told what could not be done here and is left to the device.
    Raises:
        GateError: after the bundle with its evidence is written.
    """
    if not exported(work, job):
        with stage("export") as log:
            run_export(job, work, log, warn)
    check_graphs(work, warn)
    try:
        _build_once(work, stage)
    except EnvironmentMismatch as e:
        warn(str(e))
    return _judge(work, None, questions, per_kind, rounds, threads, stage)


def finish(
    work: Workspace, questions: Path | None = None, per_kind: int = 200, rounds: int = 9, threads: int | None = None,
    stage: Stage = unseen, warn: Log = silent,
) -> Bundle:  # fmt: skip
    """All stages behind export, of graphs that came from elsewhere: a device needs neither PyTorch nor the checkpoint. Engines that
    are there already are kept.

    Args:
        stage, warn: as in `run`.
    Raises:
        EnvironmentMismatch: the engines cannot be built here. VerificationError: the bundle was changed. UsageError: questions, but no PyTorch
        to answer them too. GateError: after the bundle with its evidence is written.
    """
    if (work.folder / MANIFEST).is_file():
        Bundle.open(work.folder)
    recorded = why_recorded(Job.read(work))
    if recorded is not None and questions is not None:
        raise UsageError(
            f"--questions needs PyTorch and the checkpoint, but: {recorded.rstrip('.')}. Ask them where the model was exported, or leave them out."
        )
    if (work.folder / SIGNATURE).is_file():
        warn("The signature holds for the manifest as it was; `edgetrim pack --sign` signs the new one.")
    _build_once(work, stage)
    return _judge(work, recorded, questions, per_kind, rounds, threads, stage)


def _build_once(work: Workspace, stage: Stage) -> None:
    if not (work.engines / "engines.json").is_file():
        with stage("build") as log:
            run_build(work, log)


def _judge(
    work: Workspace, recorded: str | None, questions: Path | None, per_kind: int, rounds: int, threads: int | None, stage: Stage
) -> Bundle:  # fmt: skip
    """Validate, bench and pack. recorded: why without PyTorch, or None."""
    gate: GateError | None = None
    with stage("validate") as log:
        try:
            if recorded is None:
                run_validate(work, questions, per_kind, threads, log)
            else:
                run_validate_recorded(work, threads, log)
        except GateError as e:
            gate = e
    with stage("bench") as log:
        run_bench(work, rounds, threads=threads, compare=recorded is None, log=log)
    with stage("pack"):
        bundle = run_pack(work)
    if gate is not None:
        raise gate
    return bundle


def _forget(work: Workspace, *names: str) -> None:
    """Remove results that the new ones outdate."""
    import shutil

    for name in names:
        path = work.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
