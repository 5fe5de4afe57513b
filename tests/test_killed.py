"""A verb that is killed at any step it takes in its folder leaves what verifies, or what no other verb takes; and starts again."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.backends._contract import EngineRecord
from exporter.bundle import MANIFEST, SCHEMA, Bundle, contents, sha256
from exporter.engines import checked_engine, engine_records
from exporter.errors import ExportError
from exporter.graphset import GraphSet
from exporter.job import Job
from exporter.pipeline import run_build, run_export
from exporter.stages import build, export
from exporter.workspace import Workspace
from tests.test_graphset import example

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a killed process is forked here")

OLD, NEW = (Job("embedded", (f"visionzip:keep={n}",), "cpu_fp32") for n in (32, 16))
STEPS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open")


def killed_at(step: int, work: Callable[[], object], below: Path) -> bool:
    """Whether the work, in a forked process, came to this step and was killed in front of it. Steps: what changes something below."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that the fork does not copy
        pid = os.fork()
    if pid == 0:
        left = step

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event not in STEPS or (event == "open" and not _writes(arguments)):
                return
            if (
                str(below) in str(arguments[0]) or event == "os.rmdir" or event == "os.remove"
            ):  # rmtree names files by themselves
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(hook)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


def engine(folder: Path, job: str) -> list[EngineRecord]:
    (folder / "vision.engine").write_text(f"engine of {job}")
    return [EngineRecord(("vision",), "vision.engine", sha256(folder / "vision.engine"), 1, 1.0, 1.0, "trt")]


def graphs(folder: Path, job: Job) -> GraphSet:
    """Stands for an export: graphs that say whose they are."""
    made = replace(example(), family=job.reductions[0])
    (folder / "vision.onnx").write_text(job.reductions[0])
    made.save(folder)
    return made


def bundle(folder: Path) -> None:
    """The old job's, whole."""
    work = Workspace(folder)
    for part in ("graphs", "engines", "evidence"):
        (folder / part).mkdir(parents=True)
    graphs(work.graphs, OLD)
    (work.engines / "engines.json").write_text(json.dumps(build.record_json(engine(work.engines, OLD.reductions[0]))))
    (work.evidence / "latency.json").write_text("{}")
    OLD.save(work)
    work.write(MANIFEST, json.dumps({"schema": SCHEMA, "files": contents(folder)}))


def check(folder: Path) -> None:
    if (folder / MANIFEST).is_file():
        Bundle.open(folder)
    try:
        job, found = Job.read(Workspace(folder)), GraphSet.load(folder / "graphs")
    except ExportError:
        return
    assert found.family == job.reductions[0] == (folder / "graphs" / "vision.onnx").read_text()
    if (folder / "engines" / "engines.json").is_file():
        for record in engine_records(Workspace(folder)):
            assert checked_engine(folder, record).read_text() == f"engine of {found.family}"


def at_every_step(tmp_path: Path, verb: Callable[[Workspace], object]) -> int:
    def work(folder: Path) -> None:
        with Workspace(folder).locked() as held:
            verb(held)

    step = 0
    while True:
        folder = tmp_path / str(step)
        bundle(folder)
        if not killed_at(step, lambda where=folder: work(where), folder):  # type: ignore[misc]
            return step
        check(folder)
        work(folder)
        check(folder)
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        step += 1


def test_a_build_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", lambda graphs, source, folder, *_: engine(folder, OLD.reductions[0]))
    assert at_every_step(tmp_path, run_build) > 8


def test_an_export_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of one job becomes that of another: at no step is one's job beside the other's graphs."""
    monkeypatch.setattr(Job, "plan", lambda job: job)
    monkeypatch.setattr("exporter.pipeline.calibration_for", lambda job, plan: [])
    monkeypatch.setattr("exporter.cost.roofline.foresee", lambda plan: None)
    monkeypatch.setattr(export, "export", lambda plan, folder, *_: graphs(folder, plan))
    assert at_every_step(tmp_path, lambda work: run_export(NEW, work)) > 12
