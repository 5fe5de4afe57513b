"""`edgetrim estimate`, and how `run`, `export` and `build` say what it foresees."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter import methods
from exporter.pipeline import ESTIMATE
from profiles import _schema
from tests.conftest import Said

Run = Callable[..., Said]
NANO = "orin_nano_8gb_int4"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """SmolVLM's config, alone in a folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(methods.published("smolvlm").config))
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A profile of a device that holds nothing."""
    text = (_schema.FOLDER / "cpu_fp32.toml").read_text().replace('device = "cpu"\n', "")
    path = tmp_path / "small.toml"
    path.write_text(text + '\n[device]\ntitle = "A stamp"\n\n[device.memory]\ntotal_mib = 1\n')
    return path


def test_a_table_of_one_device(edgetrim: Run) -> None:
    said = edgetrim("estimate", "-r", "visionzip:keep=32", "-p", NANO, "--text", "10", "--new-tokens", "2")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[:3] == [
        "embedded (llava)",
        "  visionzip: 64 → 32 tokens (50 % kept, 2.0× fewer)",
        "  a prompt of 10 tokens beside them, an answer of 2",
    ]
    assert "Time on Jetson Orin Nano 8 GB, MAXN_SUPER: roofline, a lower bound" in lines
    names = ["vision", "reduce and project", "prefill", "to first token", "per output token", "whole answer"]
    memory = lines.index(f"Memory at the limits of {NANO}, GiB")
    rows = [line.strip() for line in lines[:memory] if line.startswith(" ")]
    found = [next((name for name in names if row.startswith(name)), "") for row in rows]
    assert [name for name in found[-len(names) :] if name] == names
    assert lines[-1].startswith("Together ")
    assert "GiB of 7.44. The largest piece is `" in lines[-1]


def test_config_json_is_enough_and_devices_are_compared(edgetrim: Run, model: Path) -> None:
    said = edgetrim("estimate", model, "-p", NANO, "-p", "rtx_int4", "--json")
    assert (said.code, said.err) == (0, "")
    data = json.loads(said.out)
    assert [e["profile"] for e in data["estimates"]] == [NANO, "rtx_int4"]
    assert [e["fits"] for e in data["estimates"]] == [True, None]
    assert data["estimates"][1]["first_token_ms"] is None
    assert data["unreduced"] == [None, None]
    assert [s["name"] for s in data["estimates"][0]["stages"]] == ["vision", "reduce", "prefill", "decode"]


def test_an_accounting_and_a_power_mode(edgetrim: Run) -> None:
    arguments = ("estimate", "-p", NANO, "--power-mode", "15W", "--accounting", "llm-viewer")
    data = json.loads(edgetrim(*arguments, "--json").out)
    assert data["estimates"][0]["power_mode"] == "15W"
    theirs = data["accounting"][0]["stages"]
    assert theirs["prefill"]["operations"] > theirs["decode"]["operations"] > 0
    assert "The language model as LLM-Viewer, arXiv:2402.16363 reckons it" in edgetrim(*arguments).out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Which device? Pass --profile, once or more. `edgetrim list profiles` shows them."),
        (("-p", NANO, "--accounting", "llmviewer"),
         "Unknown accounting 'llmviewer'. Did you mean 'llm_viewer'? Known: llm_viewer."),
        (("-p", NANO, "--power-mode", "MAXN_SUPR"),
         "Profile `orin_nano_8gb_int4`: unknown power mode 'MAXN_SUPR'. Did you mean 'MAXN_SUPER'? Known: 15W, 25W, MAXN_SUPER."),
        (("-p", NANO, "--text", "600"),
         "Profile `orin_nano_8gb_int4` allows text = 512, and 600 is asked for. Ask for less, or raise `text` under [limits] in a "
         "profile of your own."),
    ],
)  # fmt: skip
def test_what_is_refused(edgetrim: Run, arguments: tuple[str, ...], message: str) -> None:
    assert edgetrim("estimate", *arguments) == (2, "", f"Error: {message}\n")


def test_what_does_not_fit(edgetrim: Run, small: Path) -> None:
    """The table is printed all the same. With a second profile that it fits, it is no failure."""
    said = edgetrim("estimate", "-p", small)
    assert said.code == 5
    assert said.err.startswith("Error: Profile `small`: does not fit. The engines need ")
    assert "A stamp has 0.001" in said.err
    assert "Memory at the limits of small, GiB" in said.out.splitlines()
    both = edgetrim("estimate", "-p", small, "-p", NANO)
    assert (both.code, both.err) == (0, "")
    assert both.out.splitlines()[-1].startswith("Profile `small`: does not fit.")


def test_run_refuses_before_it_begins(edgetrim: Run, small: Path, tmp_path: Path) -> None:
    said = edgetrim("run", "-p", small, "-o", tmp_path / "out")
    assert (said.code, said.out) == (5, "")
    assert said.err.startswith("Error: Profile `small`: does not fit. The engines need ")
    assert not (tmp_path / "out").exists()


def test_export_warns_and_build_refuses(edgetrim: Run, small: Path, tmp_path: Path) -> None:
    """The same words in all three; the folder is then an argument of `estimate`, too."""
    out = tmp_path / "out"
    exported = edgetrim("export", "-p", small, "-o", out, "-r", "visionzip:keep=32")
    assert exported.code == 0
    words = exported.err.removeprefix("Warning: ")
    built = edgetrim("build", out)
    assert (built.code, built.err) == (5, f"Error: {words}")
    foreseen = json.loads((out / ESTIMATE).read_text())
    assert foreseen["refusals"] == [words.rstrip("\n")]
    again = json.loads(edgetrim("estimate", out, "--json").out)
    assert again["estimates"] == [foreseen]
    assert again["reductions"][0]["name"] == "visionzip"
    elsewhere = json.loads(edgetrim("estimate", out, "-p", NANO, "-p", small, "--json").out)
    assert elsewhere["estimates"][1] == foreseen, "a file of one's own, which lies elsewhere than in the folder"
    assert elsewhere["estimates"][0]["profile"] == NANO
    said = edgetrim("estimate", out, "-r", "tome:keep=8")
    assert said.code == 2
    assert "is an output folder, whose reductions and input are settled." in said.err
    (out / ESTIMATE).write_text("{}")
    damaged = edgetrim("build", out)
    assert damaged.code == 1
    assert f"{ESTIMATE} is damaged (KeyError: 'refusals'). Run `edgetrim export` again." in damaged.err


def test_no_weights_are_read(edgetrim: Run, model: Path) -> None:
    """A weight file that nobody may open."""
    path = model / "model.safetensors"
    path.write_bytes(b"\0" * 8)
    os.chmod(path, 0)
    assert edgetrim("estimate", model, "-p", NANO).code == 0
