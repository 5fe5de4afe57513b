"""Built engines: found, checked by hash, opened. An engine is code: none is loaded that no record names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.bundle import MANIFEST, Bundle
from exporter.errors import VerificationError
from exporter.graphset import GraphSet
from exporter.workspace import Workspace
from profiles._schema import Profile

if TYPE_CHECKING:
    from exporter.backends._contract import EngineRecord, Runner


def engine_records(work: Workspace) -> list[EngineRecord]:
    from exporter.stages.build import load_records

    name = "engines/engines.json"
    return load_records(work.read_json(name, "Run `edgetrim build` first."), work.folder / name)


@contextmanager
def open_runners(
    folder: Path, profile: Profile, threads: int | None = None, profiled: bool = False
) -> Iterator[tuple[dict[str, Runner], GraphSet, Any, str]]:
    """Runners for all roles, the graphs, the embedding table, and in words what runs.

    Engines of the profile's backend where they were built and can run here; else ONNX Runtime runs the graphs they are built from.
    profiled: see `Backend.runner`.

    Raises:
        VerificationError: an engine is not what was built or packed.
    """
    from exporter.backends import ort
    from exporter.runtime.generate import embedding
    from exporter.stages.build import backend_for, built_from

    graphs = GraphSet.load(folder / "graphs")
    files = {file: folder / "graphs" / graphs.lookup.get(file, file) for file in graphs.roles()}
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
            runner = backend.runner(files[file], threads, "decode" in roles, graph, profiled)
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
