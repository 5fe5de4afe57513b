"""`edgetrim tune` killed with SIGKILL again and again ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_tune import ARGUMENTS

ROOT = Path(__file__).parents[2]
LINES = (1, 4, 7, 9)
"""Of the journal, when it is killed: with the header alone, at the cost model, among the answers, among the exports."""


def start(folder: Path) -> subprocess.Popen[str]:
    arguments = ["-c", "import sys; from exporter.cli import main; sys.exit(main())", *ARGUMENTS]
    return subprocess.Popen(
        [sys.executable, *arguments, "--budget", "quality_drop=100", "-o", str(folder)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def journal(folder: Path) -> list[Any]:
    """Without times, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "tune.jsonl").read_text().splitlines()]
    return [line for line in lines if not line.get("key", "").startswith("times")]


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    done = start(undisturbed)
    expected = json.loads(done.communicate(timeout=500)[0])

    for number in LINES:
        process = start(killed)
        path = killed / "tune.jsonl"
        while process.poll() is None and not (path.is_file() and path.read_bytes().count(b"\n") >= number):
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (killed / "winner.json").exists()

    last = start(killed)
    found = json.loads(last.communicate(timeout=500)[0])
    assert last.returncode == done.returncode == 0
    assert journal(killed) == journal(undisturbed)
    for one, two in zip(found["entries"], expected["entries"], strict=True):
        assert {**one, "measured": None} == {**two, "measured": None}
    assert sorted(p.name for p in killed.iterdir()) == ["tune.html", "tune.jsonl", "winner.json"]
