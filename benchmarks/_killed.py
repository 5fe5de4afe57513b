"""The verbs that `benchmarks.reliability` kills: what each starts from, what it must never leave, and what has to come out the same."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.bundle import DEVICES, MANIFEST, Bundle, contents
from exporter.engines import checked_engine, engine_records
from exporter.errors import ExportError
from exporter.graphset import GraphSet
from exporter.job import Job
from exporter.tune.run import JOURNAL
from exporter.workspace import Workspace

if TYPE_CHECKING:
    from tests.deploy.conftest import Device

SPECS = {"a": ["--reduce", "visionzip:keep=32"], "b": ["--reduce", "uniform:keep=16"]}
"""Two jobs: what is killed replaces what the other one left."""
CPU, BOARD = ["--profile", "cpu_int4"], ["--profile", "orin_nano_8gb_fp16"]
ASKED = ["--per-kind", "1", "--threads", "1"]
TIMED = ["--rounds", "1", "--threads", "1"]
QUICK = ["--rounds", "1", *ASKED]
WHOLE = {
    "a": ["run", *SPECS["a"], *CPU, *QUICK],
    "b": ["run", *SPECS["b"], *CPU, *QUICK],
    "rtx": ["export", *SPECS["a"], "--profile", "rtx_fp16"],
}
"""The folders that verbs start from, by name, and what makes them."""
TOOL = """#!{python}
import sys
sys.path.insert(0, {root!r})
from exporter.cli import main
sys.exit(main())
"""
"""edgetrim, as a device has it."""

Known = Mapping[str, str]
"""Digest of the graphs of a whole export → the reductions they are of."""
Faults = Iterable[str]


@dataclass(frozen=True)
class Verb:
    """What is killed.

    start: makes what it starts from, given its folder and one where both jobs are done. arguments: of the command line. faults: what
    stands there and must not, whoever was killed when. leftovers: what a verb that ended well leaves and must not. result: what has to
    come out the same, by name. victims: who may be killed: its process, its process group, or a process on the device. on_device: the
    processes there.
    """

    name: str
    start: Callable[[Path, Path], None]
    arguments: Callable[[Path], list[str]]
    faults: Callable[[Path], Faults]
    leftovers: Callable[[Path], Faults]
    result: Callable[[Path], Mapping[str, Any]]
    victims: tuple[str, ...] = ("group", "process")
    on_device: Callable[[], list[int]] = list


def verbs(known: Known, device: Device | None) -> Iterator[Verb]:
    """All of them; those that deploy only with a device."""
    for name, start, arguments in (
        ("run", nothing, ["run", *SPECS["a"], *CPU, *QUICK, "-o"]),
        ("run over another bundle", copy_of("b"), ["run", *SPECS["a"], *CPU, *QUICK, "-o"]),
        ("export over another bundle", copy_of("b"), ["export", *SPECS["a"], *CPU, "-o"]),
        ("build of a bundle", copy_of("a"), ["build"]),
        ("build with TensorRT-RTX", copy_of("rtx"), ["build"]),
        ("validate of a bundle", copy_of("a"), ["validate", *ASKED]),
        ("bench of a bundle", copy_of("a"), ["bench", *TIMED, "--no-compare"]),
        ("pack of a bundle", copy_of("a"), ["pack"]),
    ):
        yield Verb(name, start, _with_folder(arguments), lambda f: folder_faults(f, known), hidden, digests)
    search = [
        "--methods",
        "visionzip",
        "--keep",
        "0.5",
        "--budget",
        "quality_drop=100",
        "--finalists",
        "1",
        *QUICK,
        "--json",
        "-o",
    ]
    for name, profiles in (("tune", BOARD), ("tune, with times", [*CPU, *BOARD])):
        tuning = _with_folder(["tune", "embedded", *profiles, *search])
        yield Verb(name, nothing, tuning, search_faults, hidden, search_result)
    if device is not None:
        for name in ("deploy", "deploy --through copy"):
            there = Deployed(device, known, name.split()[1:])
            yield Verb(
                name, there.start, there.arguments, there.faults, there.leftovers, there.result,
                ("group", "process", "device"), there.processes,
            )  # fmt: skip


def _with_folder(arguments: list[str]) -> Callable[[Path], list[str]]:
    return lambda folder: [*arguments, str(folder)]


# --- what they start from -------------------------------------------------------------------------------------------------


def nothing(folder: Path, base: Path) -> None:
    """The verb starts from no folder."""


def copy_of(name: str) -> Callable[[Path, Path], None]:
    def copy(folder: Path, base: Path) -> None:
        shutil.copytree(base / name, folder)

    return copy


# --- output folders -------------------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, Any]:
    """Graphs, engines that are graphs (TensorRT's differ from build to build), and the answers."""
    found: dict[str, Any] = {f"graphs/{name}": entry["sha256"] for name, entry in contents(folder / "graphs").items()}
    built = engine_records(Workspace(folder)) if (folder / "engines" / "engines.json").is_file() else []
    found |= {f"engines/{r.file}": r.sha256 if r.backend == "ort" else "built" for r in built}
    for name in ("validation", "latency"):
        if (record := folder / "evidence" / f"{name}.json").is_file():
            found[name] = json.loads(record.read_text()).get("quality", "there")
    return found


def graphs_of(folder: Path) -> str:
    entries = sorted((n, e["sha256"]) for n, e in contents(folder / "graphs").items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def folder_faults(folder: Path, known: Known) -> Faults:
    """What an output folder must not hold."""
    if not folder.is_dir():
        return
    yield from _manifest_faults(folder)
    if (folder / "graphs").is_dir() and graphs_of(folder) not in known:
        yield "graphs/ is there, and holds what no whole export makes"
    try:
        job = Job.read(Workspace(folder))
        GraphSet.load(folder / "graphs")
    except ExportError:
        return  # no verb goes on from here but `export` and `run`, which begin anew
    if known.get(graphs_of(folder)) != " ".join(job.reductions):
        yield "job.json is not that of the graphs"
    try:
        for record in engine_records(Workspace(folder)) if (folder / "engines" / "engines.json").is_file() else ():
            if record.backend != "ort":
                checked_engine(folder, record)
            elif hashlib.sha256((folder / "engines" / record.file).read_bytes()).hexdigest() != record.sha256:
                yield f"engines.json names {record.file} with another hash"
    except (ExportError, OSError) as e:
        yield f"engines.json names what is not whole: {e}"
    yield from _half_written((folder / "evidence").glob("*.json"))


def _manifest_faults(folder: Path) -> Faults:
    if (folder / MANIFEST).is_file():
        try:
            Bundle.open(folder)
        except ExportError as e:
            yield f"the manifest of {folder.name} is there, and does not hold: {e}"


def _half_written(files: Iterable[Path]) -> Faults:
    for path in files:
        try:
            json.loads(path.read_text())
        except ValueError:
            yield f"{path.name} is half-written"


def hidden(folder: Path) -> Faults:
    return (f"{p.name} is left behind" for p in folder.iterdir() if p.name.startswith("."))


# --- searches -------------------------------------------------------------------------------------------------------------


def search_faults(folder: Path) -> Faults:
    """A line of the journal that cannot be read before its last one, a page that does not end, a winner that is half there."""
    if (folder / JOURNAL).is_file():
        *lines, _ = (folder / JOURNAL).read_text().split("\n")
        for line in lines:
            try:
                json.loads(line)
            except ValueError:
                yield f"{JOURNAL} has a line that cannot be read: {line[:80]}"
    if (folder / "tune.html").is_file() and not (folder / "tune.html").read_text().rstrip().endswith("</html>"):
        yield "tune.html does not end"
    yield from _half_written(folder.glob("winner.json"))


def search_result(folder: Path) -> dict[str, Any]:
    """Front, winner, every candidate and every line of the journal, without the times that were measured. The profile of the board, which
    does not run here, is why the front does not depend on them: different kinds of times are never compared."""
    told = json.loads(folder.with_suffix(".out").read_text())
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    journal = {line["key"]: line["value"] for line in lines[1:] if not line["key"].startswith("times ")}
    entries = {f"{e['profile']} {e['reductions']}": _without_times(e) for e in told["entries"]}
    return {"front": told["front"], "winner": _without_times(told["winner"]), **entries, **journal}


def _without_times(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "measured"}


# --- devices --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deployed:
    """Deployments of one job's bundle to a device, an sshd on loopback, where the other job's is live. The device's folder stands beside
    the bundle's."""

    device: Device
    known: Known
    more: list[str]

    def start(self, folder: Path, base: Path) -> None:
        shutil.copytree(base / "a", folder)
        shutil.copytree(self._prepared(base), self._app(folder), symlinks=True)

    def _prepared(self, base: Path) -> Path:
        """A device where the other job's bundle is live."""
        app = base / "device"
        if not (app / "current").exists():
            from exporter.deploy import deploy
            from exporter.deploy.ssh import Host

            shutil.rmtree(app, ignore_errors=True)
            tool = app / "venv/bin/edgetrim"
            tool.parent.mkdir(parents=True)
            tool.write_text(TOOL.format(python=sys.executable, root=str(Path(__file__).resolve().parents[1])))
            tool.chmod(0o755)
            deploy.deploy(Bundle.open(base / "b"), Host("device", str(app)), deploy.Request(config=self._config()))
        return app

    def _config(self) -> Path:
        """One connection each: sessions do not share one, whose process would outlive the verb."""
        return self.device.configure(self.device.port, self.device.root / "known_hosts")

    @staticmethod
    def _app(folder: Path) -> Path:
        return folder.with_name("app")

    def arguments(self, folder: Path) -> list[str]:
        to = ["--to", f"device:{self._app(folder)}", "--ssh-config", str(self._config())]
        return ["deploy", str(folder), *to, *self.more]

    def faults(self, folder: Path) -> Faults:
        """What is live is whole and one of the two; so is whatever has a manifest."""
        app = self._app(folder)
        yield from folder_faults(folder, self.known)
        yield from _half_written((folder / DEVICES).glob("*.json"))
        if not (app / "current" / MANIFEST).is_file():
            yield "nothing is live"
        for release in (app / "releases").iterdir():
            yield from folder_faults(release, self.known)
        for line in (app / "record" / "history.jsonl").read_text().splitlines():
            try:
                json.loads(line)
            except ValueError:
                yield "the history has a line that cannot be read"

    def leftovers(self, folder: Path) -> Faults:
        app = self._app(folder)
        yield from hidden(folder)
        expected = {"current", "releases", "record", "venv", ".lock"}
        yield from (f"{p.name} is left behind on the device" for p in app.iterdir() if p.name not in expected)
        if len(releases := list((app / "releases").iterdir())) > 2:
            yield f"{len(releases)} releases are left on the device"

    def result(self, folder: Path) -> dict[str, Any]:
        live = self._app(folder) / "current"
        (record,) = (folder / DEVICES).glob("*.json")
        told = json.loads(record.read_text())
        return {"live": os.readlink(live), "recorded": told["release"], "steps": sorted(told["steps"]), **digests(live)}

    def processes(self) -> list[int]:
        return running_with(f"EDGETRIM_TEST_DEVICE={self.device.root}")


def running_with(entry: str) -> list[int]:
    """Processes of which an entry of the environment begins so (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if any(e.startswith(entry.encode()) for e in path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found
