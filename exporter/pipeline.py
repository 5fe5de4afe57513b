"""The stages in order: export → build → validate → bench → pack. Each reads what the one before left on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter import __version__
from exporter._typed import typed
from exporter.bundle import MANIFEST, SCHEMA, SIGNATURE, Bundle, contents
from exporter.errors import EnvironmentMismatch, ExportError, GateError, UsageError, VerificationError
from exporter.graphset import GraphSet
from exporter.workspace import Workspace
from profiles import _schema
from profiles._schema import Profile

if TYPE_CHECKING:
    from exporter.backends._contract import EngineRecord, Runner
    from exporter.plan import Plan
    from exporter.stages._task import Question

Log = Callable[[str], None]
EMBEDDED = "embedded"
"""The name of the model that ships with the package."""
JOB = "job.json"
"""What was asked for; written last, so that graphs which have one are whole."""
ESTIMATE = "evidence/estimate.json"
"""What export foresaw; only of profiles that know their device's memory."""


def folder_of(checkpoint: str, weights: bool = True) -> Path:
    """The folder of a checkpoint as typed: a path, a hub id, or the embedded model. Raises as `checkpoint.resolve`.

    Args:
        weights: whether they are wanted too, or what is about them is enough.
    """
    from exporter.checkpoint import resolve

    if checkpoint == EMBEDDED:
        from exporter.embedded import CHECKPOINT

        return CHECKPOINT
    return resolve(checkpoint, weights=weights)


def silent(text: str) -> None:
    """The default log."""


@dataclass(frozen=True)
class Job:
    """What the user asked for; written to job.json so that every verb can go on from the folder alone.

    checkpoint: as typed. profile: a name or a path. image_size: height, width or None. clip: the CLIP checkpoint that
    the model's tower came from, as typed, or None. quantizer: in place of the profile's. calibration: a file of questions for it;
    None: some of the embedded set's kind.
    """

    checkpoint: str
    reductions: tuple[str, ...]
    profile: str
    frames: int = 1
    image_size: tuple[int, int] | None = None
    clip: str | None = None
    quantizer: str | None = None
    calibration: str | None = None
    folder: Path | None = field(default=None, compare=False)
    """The output folder that it was read from. A profile of the user's own lies there too, and travels with the bundle."""

    def plan(self, weights: bool = True) -> Plan:
        """Check everything, in words. Raises UsageError or CheckpointError.

        Args:
            weights: False: the plan is to be reckoned with, not exported, so config.json is enough.
        """
        from exporter import methods
        from exporter.checkpoint import Checkpoint
        from exporter.families._contract import Request
        from exporter.plan import Unfit, check_weights, make_plan

        folder = folder_of(self.checkpoint, weights)
        profile = self.loaded_profile()
        clip = None if self.clip is None else Checkpoint(folder_of(self.clip, weights))
        try:
            plan = make_plan(Checkpoint(folder), self.reductions, profile, Request(self.frames, self.image_size, clip))
        except Unfit as e:
            fitting = methods.families_in_words(methods.families(e.method))
            raise UsageError(f"{e} At its defaults it fits: {fitting}.") from e
        if weights:
            check_weights(plan)
        return plan

    def loaded_profile(self) -> Profile:
        """Raises as `_schema.load`. A profile of the user's own is read from the output folder, once there is one."""
        profile = _schema.load(self._profile_file if _schema.is_path(self.profile) else self.profile)
        return profile if self.quantizer is None else _schema.with_quantizer(profile, self.quantizer)

    @property
    def _profile_file(self) -> Path:
        path = Path(self.profile)
        return path if self.folder is None else self.folder / path.name

    def save(self, work: Workspace) -> None:
        """job.json, and the profile if it is a file of the user's."""
        said = {name: value for name, value in asdict(self).items() if name != "folder"}
        if _schema.is_path(self.profile):
            work.write(self._profile_file.name, self._profile_file.read_text(encoding="utf-8"))
        work.write(JOB, json.dumps(said, indent=1) + "\n")

    @classmethod
    def read(cls, work: Workspace) -> Job:
        raw = work.read_json(JOB, "Run `edgetrim export` first.")
        try:
            return replace(typed(cls, raw), folder=work.folder)
        except ValueError as e:
            raise ExportError(f"{work.folder / JOB} is damaged ({e}). Run `edgetrim export` again.") from e


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


def engine_records(work: Workspace) -> list[EngineRecord]:
    from exporter.stages.build import load_records

    name = "engines/engines.json"
    return load_records(work.read_json(name, "Run `edgetrim build` first."), work.folder / name)


@contextmanager
def open_runners(
    folder: Path, profile: Profile, threads: int | None = None
) -> Iterator[tuple[dict[str, Runner], GraphSet, Any, str]]:
    """Runners for all roles, the graphs, the embedding table, and in words what runs.

    Engines of the profile's backend where they were built and can run here; else ONNX Runtime runs the graphs they are built from.

    Raises:
        VerificationError: an engine is not what was built or packed.
    """
    from exporter.backends import ort
    from exporter.runtime.generate import embedding
    from exporter.stages.build import backend_for, built_from

    graphs = GraphSet.load(folder / "graphs")
    files = {file: folder / "graphs" / file for file in graphs.roles()}
    backend, what = backend_for(profile), ""
    if not backend.runs_graphs:
        engines = runnable_engines(folder, graphs, profile)
        files |= engines
        if not engines:
            backend, what = ort.BACKEND, f", on the graphs of {profile.name}"
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for file, roles in graphs.roles().items():
            graph = folder / "graphs" / built_from(file, graphs, profile)
            runner = backend.runner(files[file], threads, "decode" in roles, graph)
            runners |= dict.fromkeys(roles, stack.enter_context(runner))
        yield runners, graphs, embedding(folder / "graphs", graphs), runners["vision"].in_words + what


def runnable_engines(folder: Path, graphs: GraphSet, profile: Profile) -> dict[str, Path]:
    """Graph file → its engine, with the hash that its record and, in a bundle, the manifest say; none where this machine cannot run
    them, or where they were not built.

    Raises:
        VerificationError: an engine is missing, or is not what was built or packed.
    """
    from exporter.stages.build import backend_for

    backend = backend_for(profile)
    if backend.runs_graphs or backend.missing_to_run() or not (folder / "engines" / "engines.json").is_file():
        return {}
    records = {record.roles: record for record in engine_records(Workspace(folder))}
    found = {}
    for file, roles in graphs.roles().items():
        if (record := records.get(roles)) is None:
            raise VerificationError(
                f"{folder} has no engine for {' and '.join(roles)}. Run `edgetrim build {folder}` again."
            )
        found[file] = checked_engine(folder, record)
    return found


def checked_engine(folder: Path, record: EngineRecord) -> Path:
    """An engine with the hash that its record and, in a bundle, the manifest say: an engine is code.

    Raises:
        VerificationError: it is not there, or is not what was built or packed.
    """
    from exporter.bundle import sha256

    name = f"engines/{record.file}"
    if Path(record.file).name != record.file or not (folder / name).is_file():
        raise VerificationError(f"{folder} has no engine {record.file}. Run `edgetrim build {folder}` again.")
    packed = Bundle.open(folder, verify=False).manifest["files"] if (folder / MANIFEST).is_file() else None
    digest = sha256(folder / name)
    if digest != record.sha256 or (packed is not None and packed.get(name, {}).get("sha256") != digest):
        raise VerificationError(
            f"{folder / name} is not the engine that was built or packed (its hash differs); it is not loaded. Run "
            f"`edgetrim build {folder}` again, or copy the bundle again."
        )
    return folder / name


def questions_for(job: Job, path: Path | None, per_kind: int) -> list[Question]:
    """The user's questions, or the embedded set for the embedded model; none for any other model."""
    from exporter.stages import _task

    if path is not None:
        return _task.from_file(path, job.frames)
    return _task.embedded(job.frames, per_kind) if job.checkpoint == EMBEDDED else []


def calibration_for(job: Job, plan: Plan) -> list[Question]:
    """Whose activations are looked at: the user's questions, or embedded ones on digits that no evaluation asks about; none
    where nobody looks."""
    from exporter.stages import _calibrate, _task

    if not _calibrate.wanted(plan) and plan.profile.precision.islands == "none":
        return []
    if job.calibration is not None:
        return _task.from_file(Path(job.calibration), job.frames)
    return _task.for_calibration(job.frames)


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


def synthetic(
    work: Workspace, graphs: GraphSet, count: int = 3
) -> tuple[list[Any], list[list[int]], list[dict[str, Any]]]:
    """Smooth random images, random prompts, and what else `reduce` takes, for models without questions. Seeded."""
    import numpy as np

    from exporter.runtime import question

    rng = np.random.default_rng(0)
    image, frames = graphs.image, graphs.visual.frames
    pixels, prompts = [], []
    words = [
        t for t in range(min(graphs.text.vocab, 1000)) if t != graphs.text.image_token and t not in graphs.text.eos
    ]
    for _ in range(count):
        coarse = rng.normal(size=(1, frames, 3, 8, 8))
        rows, cols = -(-image.height // 8), -(-image.width // 8)
        pixels.append(np.kron(coarse, np.ones((rows, cols)))[..., : image.height, : image.width].astype(np.float32))
        ids = rng.choice(words, 12).tolist()
        prompts.append([*ids[:2], *[graphs.text.image_token] * graphs.visual.placeholders, *ids[2:]])
    sides: list[dict[str, Any]] = [{} for _ in range(count)]
    for reader in question.readers(work.graphs / "processor"):
        for n, side in enumerate(sides, 1):
            side.update(reader.side([f"What is in image {n}?"]))
    return pixels, prompts, sides


def run_bench(
    work: Workspace,
    rounds: int = 9,
    new_tokens: int = 16,
    threads: int | None = None,
    compare: bool = True,
    log: Log = silent,
) -> dict[str, Any]:
    """Latency per stage; writes evidence/latency.json and returns it.

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
        variants = [bench.Variant("engine_reduced" if job.reductions else "engine_unreduced", runners, graphs, table)]
        if compare:
            from exporter.stages._reference import reference

            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            plan = job.plan()
            variants.append(bench.Variant(variants[0].name.replace("engine", "reference"), *reference(plan)))
            if job.reductions:
                bare = replace(job, reductions=())
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
    record = {
        "executed": what,
        "machine": device.machine(),
        "versions": versions(),
        "threads": threads,
        "rounds": rounds,
        "new_tokens": new_tokens,
        "visual_tokens": {"before": graphs.visual.total, "kept": graphs.visual.kept},
        "variants": {
            name: {stage: asdict(t) for stage, t in stages.items()} for name, stages in bench.timings(taken).items()
        },
    }
    _forget(work, MANIFEST)
    work.write("evidence/latency.json", json.dumps(record, indent=1) + "\n")
    return record


def run_pack(work: Workspace, key: Path | None = None) -> Bundle:
    """Write the report, a build recipe where there are no engines, and the manifest: the folder is a bundle from then on.

    The same folder gives the same bytes.

    Args:
        key: an OpenSSH key to sign the manifest with.
    """
    from exporter import signature
    from exporter.stages import recipe
    from exporter.stages.report import write_report

    job = Job.read(work)
    graphs = GraphSet.load(work.graphs)
    _forget(work, MANIFEST, SIGNATURE)
    work.forget_unfinished()
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
        "versions": versions(),
        "evidence": sorted(n for n in files if n.startswith("evidence/")),
        "engines": sorted(n for n in files if n.startswith("engines/") and n.endswith(".engine")),
        "files": files,
    }
    work.write(MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    if key is not None:
        signature.sign(work.folder / MANIFEST, key, work.folder / SIGNATURE)
    return Bundle.open(work.folder, verify=False)


def versions() -> dict[str, str]:
    """Installed versions of what shaped the result."""
    found = {"edgetrim": __version__}
    for name in (
        "torch",
        "transformers",
        "onnx",
        "onnxruntime-gpu",
        "onnxruntime",
        "tensorrt-rtx-cu13",
        "tensorrt",
        "numpy",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def exported(work: Workspace, job: Job) -> bool:
    """Whether the workspace already holds this very job's graphs: the profile counts by what it says."""
    try:
        found = Job.read(work)
        same = found.loaded_profile() == job.loaded_profile() and replace(found, profile=job.profile) == job
        return same and (work.graphs / "graphs.json").is_file()
    except (UsageError, ExportError):
        return False


def run(
    job: Job, work: Workspace, questions: Path | None = None, per_kind: int = 200, rounds: int = 9, threads: int | None = None,
    stage: Callable[[str], Any] | None = None, warn: Log = silent,
) -> Bundle:  # fmt: skip
    """All stages. What is already on disk for the same job is kept.

    Args:
        stage: opens a context around a stage that yields its log (as `Output.stage` does).
        warn: told what could not be done here and is left to the device.
    Raises:
        GateError: after the bundle with its evidence is written.
    """
    from contextlib import nullcontext

    around = stage or (lambda title: nullcontext(silent))
    if not exported(work, job):
        with around("export") as log:
            run_export(job, work, log, warn)
    check_graphs(work, warn)
    if not (work.engines / "engines.json").is_file():
        try:
            with around("build") as log:
                run_build(work, log)
        except EnvironmentMismatch as e:
            warn(str(e))
    gate: GateError | None = None
    with around("validate") as log:
        try:
            run_validate(work, questions, per_kind, threads, log)
        except GateError as e:
            gate = e
    with around("bench") as log:
        run_bench(work, rounds, threads=threads, log=log)
    with around("pack"):
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
