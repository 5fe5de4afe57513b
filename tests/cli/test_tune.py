"""`edgetrim tune` of the embedded model, and what it refuses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Said

TEMPLATE = "visionzip:keep_ratio={ratio},cls=off,position=keep"
ARGUMENTS = (
    "tune", "embedded", "-p", "cpu_fp32", "--methods", TEMPLATE, "--keep", "0.5", "--per-kind", "4", "--rounds", "1",
    "--finalists", "1", "--threads", "1", "--json",
)  # fmt: skip


def test_tune(edgetrim: Callable[..., Said], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    said = edgetrim(*ARGUMENTS, "--kv", "int8", "--budget", "memory=100000", "-o", folder)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert {e["role"] for e in found["entries"]} == {"method", "control", "unreduced"}
    exported = [e for e in found["entries"] if e["exported"]]
    assert {e["role"] for e in exported} == {"method", "unreduced"}
    assert all(e["exported"]["asked"] == 8 and e["measured"]["ttft_ms"] > 0 for e in exported)
    for e in exported:  # FP32 engines answer as PyTorch does
        assert e["exported"]["right"] == e["pytorch"]["right"]
    assert sorted(p.name for p in folder.iterdir()) == ["tune.html", "tune.jsonl", "winner.json"]
    winner = json.loads((folder / "winner.json").read_text())
    assert winner == found["winner"] and winner["command"] in (folder / "tune.html").read_text().replace("&#39;", "'")
    assert shlex.split(winner["command"])[:3] == ["edgetrim", "run", "embedded"]
    assert "--kv int8" in winner["command"]

    # Again, with another budget: everything is known, another one wins.
    before = (folder / "tune.jsonl").read_bytes()
    said = edgetrim(*ARGUMENTS, "--kv", "int8", "--budget", "ttft=0.0001", "-o", folder)
    assert said.code == 4 and "Nothing is within ttft ≤ 0.0001 ms: the best has" in said.err
    assert (folder / "tune.jsonl").read_bytes() == before
    assert not (folder / "winner.json").exists()

    # With other questions it is another search.
    said = edgetrim(*ARGUMENTS, "--kv", "int8", "--seed", "1", "--budget", "ttft=1", "-o", folder)
    assert said.code == 2 and "is of another search: questions differ" in said.err
    said = edgetrim(*ARGUMENTS, "--budget", "ttft=1", "-o", folder)
    assert said.code == 2 and "is of another search: profiles differ" in said.err
    assert (folder / "tune.jsonl").read_bytes() == before


@pytest.mark.slow
def test_the_printed_command_works(
    edgetrim: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert edgetrim(*ARGUMENTS, "--budget", "quality_drop=100", "-o", "out").code == 0
    command = json.loads(Path("out/winner.json").read_text())["command"]
    said = edgetrim(*shlex.split(command)[1:], "--per-kind", "2", "--rounds", "1", "--threads", "1")
    assert said.code == 0, said.err
    assert Path("winner/manifest.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["embedded", "--budget", "ttft=1"], "Which device? Pass --profile"),
        (["embedded", "-p", "cpu_fp32"], "Missing option '--budget'"),
        (["embedded", "-p", "cpu_fp32", "--budget", "speed=1"], "There is no budget 'speed'"),
        (["embedded", "-p", "cpu_fp32", "--budget", "ttft=1", "--keep", "2"], "'2' is no list of keep ratios"),
        (["embedded", "-p", "cpu_fp32", "--budget", "ttft=1", "--methods", "fastw"], "Did you mean 'fastv'"),
        (
            ["embedded", "-p", "cpu_fp32", "--budget", "ttft=1", "--methods", "slowfast"],
            "No method that was asked for fits:",
        ),
        (["embedded", "-p", "cpu_fp32", "--budget", "ttft=1", "--frames", "3"], "Pass --questions FILE.jsonl"),
    ],
)
def test_refusals(edgetrim: Callable[..., Said], tmp_path: Path, arguments: list[str], said: str) -> None:
    found = edgetrim("tune", *arguments, "-o", tmp_path / "out")
    assert found.code == 2 and said in found.err and found.out == ""
    assert not (tmp_path / "out").exists()
