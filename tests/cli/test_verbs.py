"""What the verbs print about one finished run of the embedded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import SPEC
from tests.conftest import Said

Run = Callable[..., Said]
Finished = tuple[Path, int, str]


def test_run(finished: Finished) -> None:
    folder, code, out = finished
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == [
        "embedded (llava) for cpu_fp32: fp32",
        "  visionzip: 64 → 32 tokens (50 % kept, 2.0× fewer)",
    ]
    assert "Fidelity: ONNX Runtime, CPU, against PyTorch FP32" in lines
    assert "Quality: right answers to 4 questions" in lines
    assert "Latency: median ms of 1 rounds; engine: ONNX Runtime, CPU" in lines
    assert lines[-1] == f"Report: {folder / 'report.html'}"
    made = {p.name for p in folder.iterdir()}
    assert made == {"engines", "evidence", "graphs", "job.json", "manifest.json", "report.html"}
    told = json.loads((folder / "evidence/layers.json").read_text())["engines"]
    assert list(told) == ["vision", "reduce", "prefill and decode"]
    assert any("visionzip" in layer["scopes"] and layer["kind"] == "TopK" for layer in told["reduce"])
    assert all(layer["ms"] >= 0 for layers in told.values() for layer in layers)


def test_a_second_run_keeps_the_graphs(edgetrim: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the graphs are there already")

    for name in ("run_export", "run_build"):
        monkeypatch.setattr(f"exporter.pipeline.{name}", never)
    for name in ("run_validate", "run_bench"):
        monkeypatch.setattr(f"exporter.pipeline.{name}", lambda *_, **__: {})
    said = edgetrim("run", "-r", SPEC, "-o", bundle, "--json")
    assert said.code == 0
    data = json.loads(said.out)
    assert data["visual_tokens"] == {"before": 64, "into_llm": 32, "per_kv_group": [32]}
    assert [e["roles"] for e in data["engines"]] == [["vision"], ["reduce"], ["prefill", "decode"]]
    assert data["validation"]["failed"] == []
    assert set(data["latency"]["variants"]) == {
        f"{kind}_{how}" for kind in ("engine", "reference") for how in ("reduced", "unreduced")
    }


def test_inspect_a_bundle(edgetrim: Run, finished: Finished) -> None:
    said = edgetrim("inspect", finished[0])
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    count = sum(p.is_file() for p in finished[0].rglob("*")) - 1  # the manifest names all others
    assert lines[0].startswith(f"Bundle {finished[0]}: {count} files, ")
    assert lines[0].endswith(" MB, every hash is right")
    assert "  visionzip: 64 → 32 tokens (50 % kept, 2.0× fewer)" in lines
    assert edgetrim("inspect", finished[0], "--no-verify").out.splitlines()[0].endswith(" MB, not verified")


def test_inspect_a_folder_that_is_not_packed(edgetrim: Run, bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    first = edgetrim("inspect", bundle).out.splitlines()[0]
    assert (
        first
        == f"Folder {bundle}: not packed, so there is nothing to verify it with. `edgetrim pack {bundle}` packs it."
    )


def test_inspect_a_graph(edgetrim: Run, finished: Finished) -> None:
    data = json.loads(edgetrim("inspect", finished[0] / "graphs" / "reduce.onnx", "--json").out)
    assert [v["name"] for v in data["outputs"]] == ["visual_embeds", "index"]
    assert data["outputs"][0] == {"name": "visual_embeds", "type": "float", "shape": ["batch", 32, 192]}
    assert list(data["scopes"]) == ["", "visionzip", "projector"]
    assert sum(sum(kinds.values()) for kinds in data["scopes"].values()) == data["nodes"]
    table = edgetrim("inspect", finished[0] / "graphs" / "reduce.onnx").out
    assert " visionzip " in table


def test_inspect_what_is_no_graph(edgetrim: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\xff\xff\xff")
    said = edgetrim("inspect", path)
    assert (said.code, said.err) == (1, f"Error: {path} cannot be read as ONNX (DecodeError). Export it again.\n")


def test_chat(edgetrim: Run, finished: Finished, tmp_path: Path) -> None:
    """Whatever the weights answer: what is streamed and what is data is the same."""
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    said = edgetrim("chat", finished[0], "--image", tmp_path / "black.png", "How many sevens are there?", "--json")
    assert (said.code, said.err) == (0, "")
    data = json.loads(said.out)
    assert (data["executed"], data["expected"], len(data["turns"])) == ("ONNX Runtime, CPU", None, 1)
    assert data["turns"][0]["question"] == "How many sevens are there?"
    streamed = edgetrim("chat", finished[0], "--image", tmp_path / "black.png", "How many sevens are there?")
    assert streamed.out == data["turns"][0]["answer"] + "\n"


def test_chat_about_a_sample(edgetrim: Run, finished: Finished) -> None:
    lines = edgetrim("chat", finished[0]).out.splitlines()
    assert lines[1].startswith("Asked: Which digit is in row ")
    assert " The right answer is: " in lines[1]


def test_a_conversation(edgetrim: Run, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["How many sevens are there?", "How many ones are there?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    said = edgetrim("chat", finished[0])
    assert (said.code, len(said.out.splitlines())) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "a.png", "--image", "b.png"), "2 images for a model that takes 1. "),
        (("--image", "a.png", "--clip", "b"), "Give --image or --clip, not both."),
        (("--image", "absent.png"), "There is no image absent.png."),
    ],
)
def test_images_that_do_not_fit(edgetrim: Run, finished: Finished, arguments: tuple[str, ...], message: str) -> None:
    said = edgetrim("chat", finished[0], *arguments, "What?")
    assert (said.code, said.out) == (2, "")
    assert message in said.err


def test_visualize_a_bundle(edgetrim: Run, finished: Finished, tmp_path: Path) -> None:
    said = edgetrim("visualize", finished[0], "-o", tmp_path, "--json")
    assert said.code == 0
    (drawn,) = json.loads(said.out)
    assert (drawn["method"], drawn["before"], len(drawn["index"])) == (SPEC, 64, 32)
    with Image.open(drawn["file"]) as image:
        assert image.width == 384


def test_visualize_methods(edgetrim: Run, tmp_path: Path) -> None:
    specs = ("uniform:keep=16", "uniform:keep=32 + fastv:keep=8")
    said = edgetrim("visualize", "-r", specs[0], "-r", specs[1], "-o", tmp_path, "--json")
    found = json.loads(said.out)
    assert [(d["method"], len(d["index"])) for d in found] == [(specs[0], 16), (specs[1], 8)]
    assert set(found[1]["index"]) <= set(range(64))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["uniform-keep-16.png", "uniform-keep-32-fastv-keep-8.png"]


def test_visualize_needs_a_reduction(edgetrim: Run, tmp_path: Path) -> None:
    said = edgetrim("visualize", "-o", tmp_path / "x")
    assert said.code == 2
    assert said.err.startswith("Error: Which reduction? Give --reduce")
    assert not (tmp_path / "x").exists()
