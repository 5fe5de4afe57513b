"""`edgetrim lint`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from exporter import pipeline
from exporter.bundle import MANIFEST
from exporter.errors import EnvironmentMismatch
from exporter.workspace import Workspace
from tests.lint.graphs import CASES, I64, Graph


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A graph of the user's."""
    g = Graph()
    merged = g.op(
        "ScatterElements", g.input("x", [4, 8]), g.input("i", [2, 8], I64), g.input("u", [2, 8]), reduction="add"
    )
    path = tmp_path / "mine.onnx"
    onnx.save(g.model(g.op("Relu", merged)), path)
    return path


def test_a_graph_of_ones_own(edgetrim: Any, mine: Path) -> None:
    said = edgetrim("lint", mine, "--profile", "rtx_fp16")
    assert said.code == 5
    assert said.out == (
        "TensorRT-RTX 1.7 for `rtx_fp16`, 1 graph: 1 finding\n"
        "mine.onnx: ScatterElements `n0` is rejected: a reduction is not supported. Multiply with a one-hot matrix (Equal with the "
        "range of targets, Cast, MatMul).\n"
        "  Source: measured with tensorrt_rtx 1.7.1.116\n"
    )
    assert (
        said.err == "Error: TensorRT-RTX 1.7 would reject or miscompile 1 node. The list says what to do about each.\n"
    )


def test_an_older_table(edgetrim: Any, mine: Path) -> None:
    said = edgetrim("lint", mine, "--profile", "b200_fp16")
    assert said.code == 0, "slow only"
    assert said.out.startswith(
        "TensorRT 10.3 for `b200_fp16` (the newest table that is not newer than its TensorRT 10.8), 1 graph: 1 finding\n"
        "mine.onnx: ScatterElements `n0` is slow: "
    )


def test_as_data(edgetrim: Any, mine: Path) -> None:
    said = edgetrim("lint", mine, "--profile", "rtx_fp16", "--json")
    assert said.code == 5
    found = json.loads(said.out)
    assert (found["profile"], found["table"], found["graphs"]) == ("rtx_fp16", "TensorRT-RTX 1.7", [str(mine)])
    (finding,) = found["findings"]
    assert finding.keys() == {"graph", "node", "op", "verdict", "what", "fix", "source"}
    assert (finding["node"], finding["verdict"]) == ("n0", "rejected")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mine.onnx"], "Which target is mine.onnx for? Pass --profile"),
        (["mine.onnx", "-p", "cpu_fp32"], 'Profile `cpu_fp32` runs on backend "ort"'),
        (["nowhere", "-p", "rtx_fp16"], "nowhere is neither an .onnx file nor a folder with graphs/graphs.json"),
    ],
)
def test_refused(edgetrim: Any, mine: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str) -> None:
    monkeypatch.chdir(mine.parent)
    said = edgetrim("lint", *arguments)
    assert (said.code, said.out) == (2, "")
    assert words in said.err


@pytest.mark.parametrize("profile", ["orin_nano_8gb_int4", "thor_fp16", "rtx_fp16"])
def test_a_bundle(edgetrim: Any, bundle: Path, profile: str) -> None:
    """Its plain graphs, though it was made for a flavour."""
    said = edgetrim("lint", bundle, "--profile", profile, "--json")
    found = json.loads(said.out)
    assert (said.code, found["findings"]) == (0, [])
    assert [Path(graph).name for graph in found["graphs"]] == ["vision.onnx", "reduce.onnx", "decode.onnx"]


def test_export_and_run_refuse_what_the_target_would(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    work = Workspace(bundle)
    pipeline.check_graphs(work)
    job = json.loads((bundle / "job.json").read_text())
    (bundle / "job.json").write_text(json.dumps(job | {"profile": "rtx_fp16"}))
    shutil.copy(bundle / "graphs/decode.onnx", bundle / "graphs/decode.ort.onnx")
    pipeline.check_graphs(work)
    onnx.save(CASES["attention_window"](), bundle / "graphs/reduce.onnx")
    with pytest.raises(
        EnvironmentMismatch, match=r"(?s)would not run these graphs:\nreduce\.onnx: Attention `n0` is miscompiled.*lint"
    ):
        pipeline.check_graphs(work)
