"""Kills verbs of the command line with SIGKILL at random moments, and looks at what they left: `python -m benchmarks.reliability`.

Every trial starts a verb in a process of its own (forked from one that has imported everything, so that the moments lie in its work),
kills it after a random part of the time that it takes undisturbed, checks the folder, and starts it again. Half of the trials kill the
whole process group, as a terminal or container does, the others that one process, as the system does when memory runs out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.bundle import MANIFEST, Bundle, contents
from exporter.engines import checked_engine, engine_records
from exporter.errors import ExportError
from exporter.graphset import GraphSet
from exporter.job import Job
from exporter.workspace import Workspace

SPECS = {"a": ["--reduce", "visionzip:keep=32"], "b": ["--reduce", "uniform:keep=16"]}
"""Two jobs: what is killed replaces what the other one left."""
LEFT_S = 10
"""In which processes that a killed one has started have to be gone."""


@dataclass(frozen=True)
class Verb:
    """What is killed. start: makes the folder that it starts from, given one where both jobs are done. arguments: of the command line."""

    name: str
    start: Callable[[Path, Path], None]
    arguments: Callable[[Path], list[str]]


@dataclass(frozen=True)
class Trial:
    """One kill. share: of the undisturbed time, when it came. left: what stood in the folder. wrong: what must not be."""

    verb: str
    seed: int
    share: float
    group: bool
    ended: bool
    left: list[str]
    wrong: list[str]


def start(arguments: list[str], folder: Path) -> int:
    """The command line in a forked process, in a group of its own; its output goes to a file beside the folder."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            log = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            from exporter.cli import main

            status = main(arguments)
        finally:
            os._exit(status)
    return pid


def finished(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digests(folder: Path) -> dict[str, str]:
    """What has to come out the same: graphs, and engines whose builder says that it repeats itself."""
    found = {f"graphs/{name}": entry["sha256"] for name, entry in contents(folder / "graphs").items()}
    built = engine_records(Workspace(folder)) if (folder / "engines" / "engines.json").is_file() else []
    return found | {f"engines/{r.file}": r.sha256 for r in built if r.details.get("repeatable")}


def graphs_of(folder: Path) -> str:
    return hashlib.sha256(
        json.dumps(sorted((n, e["sha256"]) for n, e in contents(folder / "graphs").items())).encode()
    ).hexdigest()


def faults(folder: Path, known: dict[str, str]) -> Iterable[str]:
    """What a folder must not hold, however its last writer ended. known: digest of graphs → reductions they are of."""
    if not folder.is_dir():
        return
    if (folder / MANIFEST).is_file():
        try:
            Bundle.open(folder)
        except ExportError as e:
            yield f"the manifest is there, and does not hold: {e}"
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
    for record in (folder / "evidence").glob("*.json"):
        try:
            json.loads(record.read_text())
        except ValueError:
            yield f"{record.name} is half-written"


def remaining(group: int) -> bool:
    """Whether a process of the group is still there after a while."""
    for _ in range(LEFT_S * 10):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        time.sleep(0.1)
    return True


def trial(verb: Verb, seed: int, seconds: float, base: Path, known: dict[str, str], wanted: dict[str, str]) -> Trial:
    chance = random.Random(f"{verb.name} {seed}")
    share, group = chance.random(), chance.random() < 0.5
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kill-") as scratch:
        folder = Path(scratch, "out")
        verb.start(folder, base)
        pid = start(verb.arguments(folder), folder)
        time.sleep(share * seconds)
        (os.killpg if group else os.kill)(pid, signal.SIGKILL)
        ended = finished(pid) != -signal.SIGKILL
        if remaining(pid):
            wrong.append("processes of the killed verb live on")
            os.killpg(pid, signal.SIGKILL)
        wrong += faults(folder, known)
        left = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        code = finished(start(verb.arguments(folder), folder))
        if code:
            said = folder.with_suffix(".log").read_text(errors="replace").strip().splitlines()
            wrong.append(f"started again it ends with exit code {code}: {said[-1:]}")
        elif (found := digests(folder)) != wanted:
            wrong.append(
                f"started again it makes other files: {sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))}"
            )
        wrong += [f"after the restart {text}" for text in faults(folder, known)]
        wrong += [f"{p.name} is left behind" for p in folder.iterdir() if p.name.startswith(".")]
    return Trial(verb.name, seed, round(share, 4), group, ended, left, wrong)


def nothing(folder: Path, base: Path) -> None:
    """The verb starts from no folder."""


def copy_of(name: str, *without: str) -> Callable[[Path, Path], None]:
    def copy(folder: Path, base: Path) -> None:
        shutil.copytree(base / name, folder, ignore=shutil.ignore_patterns(*without) if without else None)

    return copy


def verbs() -> list[Verb]:
    cpu = ["--profile", "cpu_int4"]
    quick = ["--per-kind", "1", "--rounds", "1", "--threads", "1"]
    return [
        Verb("run", nothing, lambda f: ["run", *SPECS["a"], *cpu, *quick, "-o", str(f)]),
        Verb("run over another bundle", copy_of("b"), lambda f: ["run", *SPECS["a"], *cpu, *quick, "-o", str(f)]),
        Verb("export over another bundle", copy_of("b"), lambda f: ["export", *SPECS["a"], *cpu, "-o", str(f)]),
        Verb("build of a bundle", copy_of("a"), lambda f: ["build", str(f)]),
        Verb("build with TensorRT-RTX", copy_of("rtx"), lambda f: ["build", str(f)]),
        Verb("pack of a bundle", copy_of("a"), lambda f: ["pack", str(f)]),
    ]


def prepare(base: Path) -> dict[str, str]:
    """Whole folders of both jobs, and of an RTX profile; returns which graphs are whose."""
    quick = ["--per-kind", "1", "--rounds", "1", "--threads", "1"]
    for name, profile, verb in (("a", "cpu_int4", "run"), ("b", "cpu_int4", "run"), ("rtx", "rtx_fp16", "export")):
        folder, spec = base / name, SPECS["a" if name == "rtx" else name]
        if folder.is_dir():
            continue
        more = quick if verb == "run" else []
        if code := finished(start([verb, *spec, "--profile", profile, *more, "-o", str(folder)], folder)):
            raise SystemExit(f"{verb} of {name} ends with exit code {code}:\n{folder.with_suffix('.log').read_text()}")
    return {
        graphs_of(base / name): spec[1] for name, spec in (("a", SPECS["a"]), ("b", SPECS["b"]), ("rtx", SPECS["a"]))
    }


def preload() -> None:
    """What verbs import, so that forked processes need not."""
    import exporter.cost.count
    import exporter.lint._check
    import exporter.stages._recorded
    import exporter.stages.bench
    import exporter.stages.build
    import exporter.stages.export
    import exporter.stages.recipe
    import exporter.stages.report
    import exporter.stages.validate  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=34, help="of each verb")
    parser.add_argument("--verb", action="append", help="only this one; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the next ones count on")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/reliability.json"), help="trials are added to it"
    )
    parser.add_argument(
        "--base", type=Path, help="where the whole folders are kept from one call to the next; else they are made anew"
    )
    asked = parser.parse_args()
    os.environ.update(EDGETRIM_CACHE="off", HF_HUB_OFFLINE="1")
    preload()
    trials: list[dict[str, Any]] = json.loads(asked.output.read_text())["trials"] if asked.output.is_file() else []
    with tempfile.TemporaryDirectory(prefix="whole-") as scratch:
        base = asked.base or Path(scratch)
        base.mkdir(parents=True, exist_ok=True)
        known = prepare(base)
        for verb in verbs():
            if asked.verb and verb.name not in asked.verb:
                continue
            folder = Path(scratch, "undisturbed")
            verb.start(folder, base)
            begin = time.perf_counter()
            if code := finished(start(verb.arguments(folder), folder)):
                raise SystemExit(f"{verb.name} ends with exit code {code}:\n{folder.with_suffix('.log').read_text()}")
            seconds, wanted = time.perf_counter() - begin, digests(folder)
            shutil.rmtree(folder)
            print(f"{verb.name}: {seconds:.1f} s undisturbed", flush=True)
            for seed in range(asked.seed, asked.seed + asked.kills):
                done = trial(verb, seed, seconds, base, known, wanted)
                trials.append(asdict(done))
                for text in done.wrong:
                    print(f"  seed {seed}, at {done.share:.0%}: {text}", flush=True)
                asked.output.parent.mkdir(parents=True, exist_ok=True)
                asked.output.write_text(json.dumps({"trials": trials}, indent=1) + "\n")
    counted = Counter(t["verb"] for t in trials)
    for name, count in counted.items():
        mine = [t for t in trials if t["verb"] == name]
        print(
            f"{name}: {count} kills, {sum(t['ended'] for t in mine)} after its end, {sum(bool(t['wrong']) for t in mine)} wrong"
        )
    return int(any(t["wrong"] for t in trials))


if __name__ == "__main__":
    sys.exit(main())
