"""report: everything a folder has evidence of, as one HTML file. Reads what the stages left on disk; no torch.

A number that is not there is shown as "not measured" with the reason: nothing stands in for it.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter import report
from exporter._typed import read_json, typed
from exporter.backends._contract import EngineRecord
from exporter.errors import VerificationError
from exporter.graphset import GraphSet
from exporter.workspace import Workspace

if TYPE_CHECKING:
    from exporter.job import Job
    from profiles._schema import Profile

REPORT = "report.html"
OTHER_ENGINES = "evidence/engines.json"
"""Engines of the same model built for other targets, that the report lists beside its own: see `engine_entries`."""
PLACES = {
    "in_tower": "inside the tower",
    "before_llm": "before the language model",
    "projector": "as the projector",
    "in_llm": "inside the language model",
    "in_cache": "in the cache",
}
DECISIVE = ("module", "JetPack", "power mode", "CPU clocks", "GPU", "driver", "GPU clocks")
"""Of `device.facts`, what a reader of latencies asks for."""
STATE = {
    "load": ("load average", ""),
    "temperature_c": ("hottest sensor", " °C"),
    "clock_mhz": ("clock of the first core", " MHz"),
}
"""Of `device.state`: words and unit."""
NO_SUCH_STAGE = "the unreduced model has no such stage."
NONE_OF_THIS = ""
"""A number that such a stage does not have."""


def write_report(work: Workspace, job: Job) -> Path:
    """Render report.html from what is on disk."""
    return report.write(collect(work, job), work.folder / REPORT)


def collect(work: Workspace, job: Job) -> report.ReportData:
    """What the folder has evidence of.

    Raises:
        VerificationError: evidence that is damaged.
    """
    from exporter.device import versions

    graphs = GraphSet.load(work.graphs)
    profile = job.loaded_profile()
    validation, latency, curves = (
        optional(work, f"evidence/{name}.json") for name in ("validation", "latency", "curves")
    )
    executed = (validation or latency or {}).get("executed", "")
    machine = _machine((latency or {}).get("machine"))
    try:
        timed = _latency(latency, job.reduces)
        return report.ReportData(
            title=_title(job, graphs),
            checkpoint=job.checkpoint,
            family=graphs.family,
            profile=profile.name,
            backend=_stack(profile),
            precision=_precision(graphs),
            device=f"{machine}, {executed}" if executed else machine,
            created=_created(latency),
            bundle_bytes=size_of(work.folder),
            unreduced_tokens=graphs.visual.total,
            kept_tokens=narrowest(graphs),
            reductions=[
                report.Reduction(r["name"], r["spec"], PLACES[r["place"]], r["before"], r["after"])
                for r in graphs.reductions
            ],
            stages=_stages(work, graphs, profile, _ran(executed, profile)),
            fidelity=[_fidelity(row) for row in (validation or {}).get("fidelity", [])],
            quality=[_quality(row) for row in (validation or {}).get("quality", [])],
            latency=[timed[s] for s in ("vision", "question", "reduce", "prefill") if s in timed],
            ttft=timed.get("ttft"),
            token=timed.get("decode"),
            answer_tokens=(latency or {}).get("new_tokens", 0),
            layers=_layers(work),
            curves=_curves(curves),
            full_accuracy=dict((curves or {}).get("full", {})),
            overlays=_overlays(work),
            answers=[report.Answer(**row) for row in (validation or {}).get("samples", [])],
            regressions=_regressions(work, validation),
            regressed=dict((validation or {}).get("regressions", {}).get("causes", {})),
            geometry=_geometry(graphs),
            versions=dict((latency or {}).get("versions") or versions()),
            notes=_notes(validation, latency, curves, executed, profile),
            environment=_environment(latency),
            command=command_lines(job, latency),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise VerificationError(
            f"{work.evidence} holds evidence that is damaged ({type(e).__name__}: {e}). Run `edgetrim validate` and `edgetrim bench` again."
        ) from e


def narrowest(graphs: GraphSet) -> int:
    """Visual tokens behind the last reduction, wherever it acts."""
    return min([graphs.visual.kept, *graphs.text.kept])


def command_lines(job: Job, latency: Mapping[str, Any] | None) -> str:
    """What makes this folder again, and what timed it. A profile of the user's own is the one that lies in the folder."""
    name = Path(job.profile).name
    asked = replace(job, profile=job.profile if name == job.profile else f"./{name}")
    lines = [["edgetrim", "run", *asked.words(), "-o", "out/"]]
    if latency is not None:
        lines.append(
            [
                "edgetrim",
                "bench",
                "out/",
                "--rounds",
                str(latency["rounds"]),
                "--new-tokens",
                str(latency["new_tokens"]),
            ]
        )
        lines[1] += [] if latency["threads"] is None else ["--threads", str(latency["threads"])]
        lines[1] += [] if len(latency["variants"]) > 1 else ["--no-compare"]
    return "\n".join(map(shlex.join, lines))


def _environment(latency: Mapping[str, Any] | None) -> dict[str, str]:
    """The machine as it was when it measured."""
    from exporter.device import RUNTIMES

    if latency is None or "facts" not in latency:
        return {}
    facts, state = latency["facts"], latency.get("state", {})
    found = {name: str(value) for name, value in facts.items() if name not in RUNTIMES}
    found["Python"] = latency["machine"]["python"]
    found["threads"] = str(latency["threads"] or "the runtime's own choice")
    found |= {words: f"{state[name]:g}{unit}" for name, (words, unit) in STATE.items() if name in state}
    return found


def _created(latency: Mapping[str, Any] | None) -> str:
    """When: SOURCE_DATE_EPOCH, else when it was measured. Not now, so that a folder packed twice gives the same bytes."""
    if (epoch := os.environ.get("SOURCE_DATE_EPOCH", "")).isdecimal():
        return time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(int(epoch)))
    utc = str(((latency or {}).get("machine") or {}).get("utc", ""))
    return f"{utc} UTC" if utc else "not timed yet"


def size_of(folder: Path) -> int:
    """Bytes of graphs, weights and engines: what a device needs. Evidence and the report are not counted."""
    parts = (folder / "graphs", folder / "engines")
    return sum(path.stat().st_size for part in parts for path in part.rglob("*") if path.is_file())


def engine_entries(work: Workspace, graphs: GraphSet, profile: Profile) -> list[dict[str, Any]]:
    """One entry per graph: its size, and the engine built from it, if one was."""
    from exporter.engines import engine_records

    built: dict[tuple[str, ...], EngineRecord] = {}
    if (work.engines / "engines.json").is_file():
        built = {record.roles: record for record in engine_records(work)}
    entries = []
    for file, roles in graphs.roles().items():
        nodes, size = _graph(work.graphs / file)
        entry: dict[str, Any] = {"roles": list(roles), "profile": profile.name, "nodes": nodes, "graph_bytes": size}
        if record := built.get(roles):
            entry |= {
                "backend": record.backend,
                "engine_bytes": record.bytes,
                "build_s": record.build_s,
                "peak_rss_mib": record.peak_rss_mib,
                "stack": " ".join(str(record.details[k]) for k in ("module", "version") if k in record.details),
                "capabilities": record.details.get("compute_capabilities") or [],
            }
        entries.append(entry)
    return entries


def _stages(work: Workspace, graphs: GraphSet, profile: Profile, executed: bool) -> list[report.Stage]:
    own = [_stage(entry, executed, _not_built(profile)) for entry in engine_entries(work, graphs, profile)]
    others = optional(work, OTHER_ENGINES) or []
    return own + [_stage(entry, False, "", f" · {entry['profile']}") for entry in others]


def _stage(entry: Mapping[str, Any], executed: bool, reason: str, suffix: str = "") -> report.Stage:
    name = " and ".join(entry["roles"]) + suffix
    if "backend" not in entry:
        return report.Stage(name, entry["nodes"], entry["graph_bytes"], reason, reason, reason, False, built=False)
    ours = entry["backend"] == "ort"
    if ours:
        note = "ONNX Runtime loads the graph itself; memory is the whole process's"
    else:
        targets = ", ".join(f"SM {c // 10}.{c % 10}" for c in entry["capabilities"])
        note = f"{entry['stack']}{f', for {targets}' if targets else ''}"
    numbers = entry["engine_bytes"], entry["build_s"], entry["peak_rss_mib"]
    return report.Stage(name, entry["nodes"], entry["graph_bytes"], *numbers, executed, note)


def _ran(executed: str, profile: Profile) -> bool:
    """Whether the profile's own engines ran, and not ONNX Runtime in their place."""
    return bool(executed) and (profile.stack.backend == "ort" or not executed.startswith("ONNX Runtime"))


def _not_built(profile: Profile) -> str:
    from exporter.stages.build import why_not_here

    return why_not_here(profile) or "`edgetrim build` has not run on this folder."


def _graph(path: Path) -> tuple[int, int]:
    """Nodes, and bytes with the weights it points to. Needs neither onnx nor onnxruntime."""
    from exporter.backends._onnx_file import OnnxFile

    found = OnnxFile(path)
    external = {path.parent / name for name in found.locations}
    return len(found.operators), sum(p.stat().st_size for p in (path, *external) if p.is_file())


def _fidelity(row: Mapping[str, Any]) -> report.Fidelity:
    """Agreement is of indices, or of tokens; a stage has the one that its name says."""
    stage, agreement = row["stage"], row["agreement"]
    tokens = stage == "greedy tokens"
    return report.Fidelity(
        stage,
        _number(row["cosine"]),
        _number(row["max_abs"]),
        NONE_OF_THIS if tokens else _number(agreement),
        _number(agreement) if tokens else NONE_OF_THIS,
        row["gate"],
        row["passed"],
    )


def _number(value: float | None) -> float | str:
    return NONE_OF_THIS if value is None else value


def _quality(row: Mapping[str, Any]) -> report.Quality:
    scores: dict[str, report.Score | str] = {kind: report.Score(*counts) for kind, counts in row["scores"].items()}
    return report.Quality(row["variant"], row["label"], scores)


def _latency(record: Mapping[str, Any] | None, reduces: bool) -> dict[str, report.Latency]:
    if record is None:
        return {}
    variants = record["variants"]

    def timed(variant: str, stage: str) -> report.Timing | str:
        if variant in variants:
            found = variants[variant].get(stage)
            return report.Timing(found["median_ms"], found["p90_ms"]) if found else NO_SUCH_STAGE
        if not reduces and variant.endswith("_reduced"):
            return "this bundle reduces nothing."
        return "left out by `--no-compare`."

    names = ("reference_unreduced", "reference_reduced", "engine_unreduced", "engine_reduced")
    stages = dict.fromkeys(stage for found in variants.values() for stage in found)
    return {stage: report.Latency(stage, *(timed(name, stage) for name in names)) for stage in stages}


def _layers(work: Workspace) -> report.Layers | None:
    from exporter.stages.bench import LAYERS

    record = optional(work, LAYERS)
    return None if record is None else typed(report.Layers, record)


def _curves(record: Mapping[str, Any] | None) -> list[report.Curve]:
    return [
        report.Curve(
            c["method"], [report.CurvePoint(p["keep_ratio"], p["accuracy"]) for p in c["points"]], c["control"]
        )
        for c in (record or {}).get("curves", [])
        if c["points"]
    ]


def _overlays(work: Workspace) -> list[report.Overlay]:
    listed = optional(work, "evidence/overlays.json") or []
    folder = work.evidence / "overlays"
    found = []
    for entry in listed:
        files = [folder / Path(name).name for name in entry["files"]]
        found.append(
            report.Overlay(
                entry["caption"], entry["method"].replace(",", ", "), [f.read_bytes() for f in files if f.is_file()]
            )
        )
    return found


def _regressions(work: Workspace, validation: Mapping[str, Any] | None) -> list[report.Regression]:
    folder = work.evidence / "regressions"
    found = []
    for row in (validation or {}).get("regressions", {}).get("shown", []):
        image = folder / Path(row["file"]).name
        if image.is_file():
            told = {name: row[name] for name in ("kind", "question", "expected", "cause", "answers")}
            found.append(report.Regression(**told, image=image.read_bytes()))
    return found


def _notes(
    validation: Mapping[str, Any] | None,
    latency: Mapping[str, Any] | None,
    curves: Mapping[str, Any] | None,
    executed: str,
    profile: Profile,
) -> list[str]:
    notes = []
    if validation is None:
        notes.append("Fidelity and quality: not measured; `edgetrim validate` has not run on this folder.")
    else:
        notes += [note[:1].upper() + note[1:] + "." for note in validation["notes"]]
        notes += [f"Quality: {gate['words']}." for gate in validation.get("gates", [])]
        notes += [f"Gate failed: {words}." for words in validation["failed"]]
    if latency is None:
        notes.append("Latency: not measured; `edgetrim bench` has not run on this folder.")
    else:
        count = latency["threads"]
        threads = f"{count} thread{'' if count == 1 else 's'}" if count else "the runtime's own choice of threads"
        load = latency["machine"].get("load")
        notes.append(
            f"Latency: batch 1, a random image, {latency['rounds']} rounds after 2 to warm up, all variants in turn in one "
            f"process, {latency['new_tokens']} tokens each, {threads}"
            f"{'' if load is None else f'; load average {load} when it was written'}."
        )
        if untold := [name for name in DECISIVE if name not in latency.get("facts", DECISIVE)]:
            notes.append(f"Not told by this machine: {', '.join(untold)}.")
    if executed and not _ran(executed, profile):
        notes.append(
            f"Every measured number is from {executed}: it checks the graphs, and says nothing about the speed of {profile.name}."
        )
    if curves is not None:
        notes.append(
            f"Curves: {curves['per_kind']} questions a kind, PyTorch FP32; the full comparison under Quality asks more."
        )
    return notes


def _title(job: Job, graphs: GraphSet) -> str:
    name = job.checkpoint.rstrip("/").rpartition("/")[2]
    how = " + ".join(r["name"] for r in graphs.reductions) or "all visual tokens"
    return f"{name}: {how}"


def _precision(graphs: GraphSet) -> str:
    compute = graphs.compute.upper()
    return compute if graphs.weights == "none" else f"{graphs.weights.upper()} weights, {compute}"


def _stack(profile: Profile) -> str:
    if profile.stack.backend == "ort":
        return "ONNX Runtime"
    return {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}.get(
        profile.stack.module or "", profile.stack.backend
    )


def _machine(found: Mapping[str, Any] | None) -> str:
    if found is None:
        from exporter.device import machine

        found = machine()
    return f"{found['processor']} ({found['cores']} cores)"


def _geometry(graphs: GraphSet) -> dict[str, str]:
    image, visual, text = graphs.image, graphs.visual, graphs.text
    found = {"Image": f"{image.height} × {image.width}", "Frames": str(graphs.images)}
    if image.parts > 1:
        whole = "" if image.overview == "none" else ", and the whole"
        found["Pictures of an image"] = f"{image.tiles[0]} × {image.tiles[1]} tiles{whole}"
    if visual.grid:
        found["Tokens of a frame" if image.parts == 1 else "Tokens of a picture"] = (
            f"{visual.grid[0]} × {visual.grid[1]}"
        )
    found["Visual tokens per KV group"] = ", ".join(map(str, text.kept))
    found["Positions"] = "kept tokens keep their ids" if visual.policy == "keep" else "renumbered without gaps"
    found["Language model"] = f"{text.layers} layers, width {text.hidden}, {text.kv_heads} KV heads of {text.head_dim}"
    found["Vocabulary"] = f"{text.vocab:,}"
    return found


def optional(work: Workspace, name: str) -> Any:
    """A JSON file that may not be there."""
    path = work.folder / name
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except ValueError as e:
        raise VerificationError(f"{path} is damaged ({e}). Run the verb that writes it again.") from e
