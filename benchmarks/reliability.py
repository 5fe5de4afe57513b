"""Kills verbs of the command line with SIGKILL at random moments, and looks at what they left: `python -m benchmarks.reliability`.

Every trial starts a verb in a process of its own (forked from one that has imported everything, so that the moments lie in its work),
kills it after a random part of the time that it takes undisturbed, looks at what is there, and starts it again. Some trials kill the
whole process group, as a terminal or container does, some that one process, as the system does when memory runs out, and of deployments
some what runs on the device. What is killed is in `_killed`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks._killed import SPECS, WHOLE, Verb, graphs_of, running_with, verbs

MARK = "EDGETRIM_TRIAL"
"""Environment variable by which processes of a trial are known."""
LEFT_S = 10
"""In which processes that a killed one has started have to be gone."""
LIMIT_S = 300
"""In which a verb has to end that is not killed itself."""


@dataclass(frozen=True)
class Trial:
    """One kill. share: of the undisturbed time, when it came. killed: one of `Verb.victims`. ended: whether it came too late. left: what
    stood in the folder. wrong: what must not be."""

    date: str
    verb: str
    seed: int
    share: float
    killed: str
    ended: bool
    left: list[str]
    wrong: list[str]


def start(arguments: list[str], folder: Path) -> int:
    """The command line in a forked process, in a group of its own; what it says goes to files beside the folder, .out and .log."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            os.environ[MARK] = str(folder)
            for number, suffix in ((1, ".out"), (2, ".log")):
                os.dup2(os.open(folder.with_suffix(suffix), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            from exporter.cli import main

            status = main(arguments)
        finally:
            os._exit(status)
    return pid


def finished(pid: int) -> int | None:
    """Its exit code; None if it has to be killed because it does not end."""
    for _ in range(LIMIT_S * 20):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def whole(arguments: list[str], folder: Path) -> None:
    """Run a verb to its good end."""
    if (code := finished(start(arguments, folder))) != 0:
        raise SystemExit(f"{arguments[0]} ends with exit code {code}:\n{folder.with_suffix('.log').read_text()}")


def remaining(verb: Verb, group: int, folder: Path) -> list[int]:
    """Processes of a trial that are still there after a while."""
    for _ in range(LEFT_S * 10):
        found = [*running_with(f"{MARK}={folder}"), *verb.on_device()]
        try:
            os.killpg(group, 0)
            found.append(group)
        except ProcessLookupError:
            if not found:
                return []
        except PermissionError:
            pass
        time.sleep(0.1)
    return found


def kill(verb: Verb, pid: int, victim: str) -> None:
    if victim == "group":
        os.killpg(pid, signal.SIGKILL)
    elif victim == "process":
        os.kill(pid, signal.SIGKILL)
    elif there := verb.on_device():
        os.kill(min(there), signal.SIGKILL)  # the first that was started: it has all others


def trial(verb: Verb, seed: int, seconds: float, base: Path, wanted: dict[str, Any]) -> Trial:
    chance = random.Random(f"{verb.name} {seed}")
    share, victim = chance.random(), verb.victims[int(chance.random() * len(verb.victims))]
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kill-") as scratch:
        folder = Path(scratch, "out")
        verb.start(folder, base)
        pid = start(verb.arguments(folder), folder)
        time.sleep(share * seconds)
        kill(verb, pid, victim)
        code = finished(pid)
        ended = code == 0 if victim == "device" else code != -signal.SIGKILL
        if code is None:
            wrong.append(f"with what it spoke to killed, it does not end in {LIMIT_S} s")
        elif victim == "device":
            wrong += unkind(folder)
        for left in remaining(verb, pid, folder):
            wrong.append(f"process {left} lives on")
            os.kill(left, signal.SIGKILL)
        wrong += verb.faults(folder)
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        code = finished(start(verb.arguments(folder), folder))
        if code != 0:
            said = folder.with_suffix(".log").read_text(errors="replace").strip().splitlines()
            wrong.append(f"started again it ends with exit code {code}: {said[-1:]}")
        elif (found := verb.result(folder)) != wanted:
            names = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
            wrong.append(f"started again it makes something else: {names}")
        wrong += unkind(folder)
        wrong += [f"after the restart {text}" for text in [*verb.faults(folder), *verb.leftovers(folder)]]
    return Trial(today(), verb.name, seed, round(share, 4), victim, ended, there, wrong)


def unkind(folder: Path) -> list[str]:
    return ["it shows a traceback"] if "Traceback" in folder.with_suffix(".log").read_text(errors="replace") else []


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def prepare(base: Path) -> dict[str, str]:
    """Whole folders of both jobs, and of an RTX profile; returns which graphs are whose."""
    for name, arguments in WHOLE.items():
        if not (base / name).is_dir():
            whole([*arguments, "-o", str(base / name)], base / name)
    return {graphs_of(base / name): SPECS["b" if name == "b" else "a"][1] for name in WHOLE}


def preload() -> None:
    """What verbs import, so that forked processes need not."""
    import exporter.cost.count
    import exporter.deploy.deploy
    import exporter.lint._check
    import exporter.stages._recorded
    import exporter.stages.bench
    import exporter.stages.build
    import exporter.stages.export
    import exporter.stages.recipe
    import exporter.stages.report
    import exporter.stages.validate
    import exporter.tune.run  # noqa: F401


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
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="whole-")))
        base = asked.base or scratch
        base.mkdir(parents=True, exist_ok=True)
        device = None
        if any(name.startswith("deploy") for name in asked.verb or ["deploy"]):
            from tests.deploy.conftest import running

            device = stack.enter_context(running(scratch / "sshd"))
        for verb in verbs(prepare(base), device):
            if asked.verb and verb.name not in asked.verb:
                continue
            folder = scratch / "undisturbed" / "out"
            folder.parent.mkdir()
            verb.start(folder, base)
            begin = time.perf_counter()
            whole(verb.arguments(folder), folder)
            seconds, wanted = time.perf_counter() - begin, dict(verb.result(folder))
            if found := [*verb.faults(folder), *verb.leftovers(folder)]:
                raise SystemExit(f"{verb.name} without a kill: {found}")
            shutil.rmtree(folder.parent)
            print(f"{verb.name}: {seconds:.1f} s undisturbed", flush=True)
            for seed in range(asked.seed, asked.seed + asked.kills):
                done = trial(verb, seed, seconds, base, wanted)
                trials.append(asdict(done))
                for text in done.wrong:
                    print(f"  seed {seed}, {done.killed} at {done.share:.0%}: {text}", flush=True)
                asked.output.parent.mkdir(parents=True, exist_ok=True)
                asked.output.write_text(json.dumps({"trials": trials}, indent=1) + "\n")
    for name, count in Counter(t["verb"] for t in trials).items():
        mine = [t for t in trials if t["verb"] == name]
        late, wrong = sum(t["ended"] for t in mine), sum(bool(t["wrong"]) for t in mine)
        print(f"{name}: {count} kills, {late} after its end, {wrong} wrong")
    return int(any(t["wrong"] for t in trials))


if __name__ == "__main__":
    sys.exit(main())
