"""How much identical bundles differ: the noise that a latency gate has to see through.

Every session opens two copies of the embedded model's bundle, in one order or the other, and times them in turn; every
start is a process of its own that opens it once. Nothing is compared: the record holds the samples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import _common
from exporter import device, pipeline
from exporter.engines import open_runners
from exporter.job import EMBEDDED, Job
from exporter.stages import bench
from exporter.stages._inputs import synthetic
from exporter.workspace import Workspace

SPEC = "visionzip:keep=32,cls=off,position=keep"
PROFILE = "cpu_int4"
STAGES = ("decode", "ttft")
"""What a user waits for; the record stays small."""
ONE = "--one-start"


def session(folder: Path, names: tuple[str, ...], rounds: int, threads: int) -> dict[str, bench.Samples]:
    """Open the bundle once for every name, in this order, and time what was opened in turn."""
    profile = Job.read(Workspace(folder)).loaded_profile()
    with ExitStack() as stack:
        opened = {n: bench.Variant(n, *stack.enter_context(open_runners(folder, profile, threads))[:3]) for n in names}
        variants = [opened[n] for n in sorted(names)]
        pixels, prompts, sides = synthetic(Workspace(folder), variants[0].graphs, 1)
        found = bench.sample(variants, pixels[0], prompts, rounds=rounds, side=sides[0])
    return {n: {s: [round(ms, 3) for ms in found[n][s]] for s in STAGES} for n in sorted(names)}


def start(folder: Path, rounds: int, threads: int) -> bench.Samples:
    """One session in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.noise", ONE, str(folder)]
    command += ["--rounds", str(rounds), "--threads", str(threads)]
    found: bench.Samples = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=40, help="openings of both copies")
    parser.add_argument("--starts", type=int, default=16, help="processes of their own")
    parser.add_argument("--rounds", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=_common.RESULTS)
    parser.add_argument(ONE, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    _common.quiet()
    if options.one_start:
        print(json.dumps(session(options.one_start, ("a",), options.rounds, options.threads)["a"]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = Workspace(Path(scratch))
        pipeline.run_export(Job(EMBEDDED, (SPEC,), PROFILE), work)
        paired, apart, begin = [], [], time.monotonic()
        for i in range(options.sessions):
            paired.append(session(work.folder, ("a", "b") if i % 2 else ("b", "a"), options.rounds, options.threads))
        seconds = (time.monotonic() - begin) / options.sessions
        for _ in range(options.starts):
            apart.append(start(work.folder, options.rounds, options.threads))
    entry: dict[str, Any] = {
        "benchmark": "noise",
        "command": f"python -m benchmarks.noise --sessions {options.sessions} --starts {options.starts} "
        f"--rounds {options.rounds} --threads {options.threads}",
        "precision": PROFILE.rpartition("_")[2],
        "reduction": SPEC,
        "machine": device.machine(),
        "versions": device.versions(),
        "threads": options.threads,
        "seconds_per_session": round(seconds, 2),
        "paired": paired,
        "starts": apart,
    }
    path = _common.write(options.results, entry)
    path.write_text(
        json.dumps(entry, separators=(",", ":")) + "\n", encoding="utf-8"
    )  # thousands of samples: not a line each
    _common.say(f"written: {path}")


if __name__ == "__main__":
    main()
