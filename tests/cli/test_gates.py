"""`bench --against`, `--save-baseline`, `--check` and `history`: what they print, write, and exit with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as xml

import pytest

from exporter import baselines, device, pipeline
from exporter.baselines import Session, Spread
from exporter.gate import Finding
from exporter.job import EMBEDDED, Job
from exporter.stages import check
from exporter.workspace import Workspace
from tests.conftest import Said

Run = Callable[..., Said]
ON_DEVICE = """
import sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"):
    sys.modules[name] = None
from exporter.cli import main
from exporter.stages import check
check.ROUNDS = range(2, 3)
sys.exit(main(sys.argv[1:]) or main([*sys.argv[1:3], "--check", *sys.argv[4:]]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = Workspace(tmp_path_factory.mktemp("gates") / "out")
    with work.locked():
        pipeline.run_export(Job(EMBEDDED, ("uniform:keep=16",), "cpu_fp32"), work)
    return work.folder


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What every start takes, one after the other, instead of measuring."""
    queue: list[float] = []

    def start(*_: object) -> tuple[Session, str]:
        ms = queue.pop(0)
        return Session.now({s: Spread((ms, ms, ms), ms, 8) for s in ("ttft", "decode")}, {"load": 0.5}), "here"

    monkeypatch.setattr(check, "start", start)
    return queue


def test_a_real_comparison(edgetrim: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ROUNDS", range(2, 3))
    before = sorted(p.name for p in folder.rglob("*"))
    said = edgetrim(
        "bench", folder, "--against", folder, "--sessions", 5, "--threads", 1, "--new-tokens", 2, "--json",
        "--junit", tmp_path / "ci" / "junit.xml",
    )  # fmt: skip
    assert said.code in (0, 4)
    data = json.loads(said.out)
    assert (data["kind"], data["sessions"], data["latency_slowdown_max"]) == ("paired", 5, 2.5)
    assert {s["stage"] for s in data["stages"]} == {"vision", "reduce", "prefill", "decode", "ttft"}
    judged = [s for s in data["stages"] if s["finding"]]
    (suite,) = xml.parse(tmp_path / "ci" / "junit.xml").getroot()
    assert (suite.get("name"), len(suite)) == ("cpu_fp32", len(judged))
    assert sorted(p.name for p in folder.rglob("*")) == before, "a bundle that is checked is only read"


def test_a_baseline_from_the_first_session_to_a_verdict(
    edgetrim: Run, folder: Path, tmp_path: Path, times: list[float]
) -> None:
    times += [10.0, 10.0, 10.01, 9.99, 10.02, 11.0]
    save = ("bench", folder, "--save-baseline", "--baselines", tmp_path)
    verify = ("bench", folder, "--check", "--baselines", tmp_path)
    said = edgetrim(*save)
    (path,) = (tmp_path / "cpu_fp32").iterdir()
    assert said.code == 0
    assert said.out.splitlines() == [
        f"Stored as session 1 of {path}.",
        "`bench --check` needs 2 more: how much sessions differ is not known before.",
    ]
    early = edgetrim(*verify)
    assert early.code == 0
    assert early.err.splitlines() == [
        f"Warning: {stage}: cannot tell after 1 session: too few sessions to know how they differ; "
        "2 more with `bench --save-baseline` would."
        for stage in ("to first token", "per output token")
    ]
    for _ in range(2):
        edgetrim(*save)
    passed = edgetrim(*verify)
    assert (passed.code, passed.err) == (0, "")
    assert passed.out.splitlines()[0] == f"Latency against {path}: not slower"
    slower = edgetrim(*verify, "--annotations", "github", "--save-baseline")
    assert slower.code == 4
    assert [line.partition("::+")[0] for line in slower.err.splitlines()[:2]] == [
        "::error title=EdgeTrim latency%3A to first token",
        "::error title=EdgeTrim latency%3A per output token",
    ]
    assert "does not pass the latency gate: to first token: +10.0 %" in slower.err
    assert len(baselines.load(path).generations[0].sessions) == 3, "what is slower is not stored"


def test_the_gate_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    arguments = ["bench", str(folder), "--save-baseline", "--baselines", str(tmp_path), "--threads", "1"]
    done = subprocess.run([sys.executable, "-c", ON_DEVICE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 more with `bench --save-baseline` would" in done.stderr


def test_strict_fails_without_a_verdict(edgetrim: Run, folder: Path, tmp_path: Path, times: list[float]) -> None:
    times += [10.0, 10.0]
    edgetrim("bench", folder, "--save-baseline", "--baselines", tmp_path)
    assert edgetrim("bench", folder, "--check", "--strict", "--baselines", tmp_path).code == 4


def test_another_device_is_refused(
    edgetrim: Run, folder: Path, tmp_path: Path, times: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    times += [10.0] * 2
    monkeypatch.setattr(check, "facts", lambda: {"processor": "x", "driver": "540.4"})
    edgetrim("bench", folder, "--save-baseline", "--baselines", tmp_path)
    monkeypatch.setattr(check, "facts", lambda: {"processor": "x", "driver": "550.1"})
    said = edgetrim("bench", folder, "--check", "--baselines", tmp_path)
    assert (said.code, said.out) == (5, "")
    assert "is not comparable: driver 540.4 → 550.1. " in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "absent"), "There is no folder absent"),
        (("--against", ".", "--check"), "choose"),
        (("--strict",), "go with --check or --against"),
        (("--save-baseline", "--junit", "x.xml"), "go with --check or --against"),
        (("--check", "--apart"), "goes with --against"),
        (("--check", "--annotations", "gitlab"), "Unknown format of annotations 'gitlab'"),
        (
            ("--check", "--baselines", "absent"),
            "absent has no baseline of embedded (uniform:keep=16) for profile `cpu_fp32`",
        ),
    ],
)
def test_what_does_not_fit(
    edgetrim: Run, folder: Path, times: list[float], arguments: tuple[str, ...], message: str
) -> None:
    times.append(10.0)
    said = edgetrim("bench", folder, *arguments)
    assert (said.code, said.out) == (2, "")
    assert message in said.err


def test_history(edgetrim: Run, folder: Path, tmp_path: Path, times: list[float]) -> None:
    times += [10.0, 12.0]
    for _ in range(2):
        edgetrim("bench", folder, "--save-baseline", "--baselines", tmp_path)
    page = tmp_path / "page.html"
    said = edgetrim("history", "cpu_fp32", "--baselines", tmp_path, "-o", page)
    assert said.code == 0
    assert said.out.splitlines()[-1] == f"Page: {page}"
    assert page.read_text().count("<circle") == 4
    data = json.loads(edgetrim("history", "cpu_fp32", "--baselines", tmp_path, "-o", page, "--json").out)
    assert len(data["baselines"][0]["baseline"]["generations"][0]["sessions"]) == 2
    wrong = edgetrim("history", "cpu_fp23", "--baselines", tmp_path, "-o", page)
    assert (wrong.code, wrong.err) == (
        2, f"Error: {tmp_path} has no baseline of profile 'cpu_fp23'. Did you mean 'cpu_fp32'? Known: cpu_fp32.\n",
    )  # fmt: skip


def test_what_would_settle_it_is_said() -> None:
    from exporter.cli import _gates

    stages = [
        check.Stage("prefill", 10, 10.4, Finding(0.04, -0.01, 0.09, "cannot tell", 20, 31)),
        check.Stage("decode", 1, 1.04, Finding(0.04, -0.3, 0.6, "cannot tell", 20, None)),
    ]
    messages = [c.message for c in _gates.latency_cases(check.Check("paired", "b", "here", 0.025, 20, stages))]
    assert messages == [
        "cannot tell after 20 sessions: +4.0 % (-1.0 % to +9.0 %); 11 more (--sessions 31) would",
        "cannot tell after 20 sessions: +4.0 % (-30.0 % to +60.0 %); this machine is too busy for any number of sessions; "
        "let nothing else run on it",
    ]


def test_the_facts_of_this_machine_compare_with_themselves() -> None:
    assert device.differences(device.facts(), device.facts()) == []
