"""The report is made of what a folder holds; what it lacks is said, never filled in."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exporter import report as pages
from exporter.backends._contract import EngineRecord
from exporter.errors import VerificationError
from exporter.graphset import GraphSet, ImageSpec, TextSpec, VisualLayout
from exporter.job import Job
from exporter.report import overlay
from exporter.stages import report
from exporter.workspace import Workspace

JOB = Job("owner/model", ("uniform:keep=8", "fastv:layer=1,keep=4"), "cpu_int4")
PNG = overlay.png(Image.new("RGB", (8, 8)))
MACHINE = {"processor": "Some CPU", "cores": 2, "load": 0.5}


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    """An exported folder: no engines, no evidence."""
    (tmp_path / "graphs").mkdir()
    reductions = [
        {"name": "uniform", "place": "before_llm", "spec": "uniform:keep=8", "before": 16, "after": 8},
        {"name": "fastv", "place": "in_llm", "spec": "fastv:layer=1,keep=4", "before": 8, "after": 4},
    ]
    files = {"vision": "vision.onnx", "reduce": "reduce.onnx", "prefill": "prefill.onnx", "decode": "decode.onnx"}
    graphs = GraphSet(
        family="llava", compute="fp32", weights="int4", files=files, reductions=reductions,
        image=ImageSpec(32, 48, "exact", 32, 48, 3, (0.5,) * 3, (0.5,) * 3),
        visual=VisualLayout(1, 1, 16, 8, (4, 4), [[i] for i in range(16)], 16, "keep"),
        text=TextSpec(8, 2, 1, 4, 32, 1, [0, 1], [8, 4], 3, [1]),
        signals={"hidden": [1, 16, 8]}, side={}, sized=False,
    )  # fmt: skip
    graphs.save(tmp_path / "graphs")
    node = bytes([0x0A, 3, 0x22, 1, ord("A")])  # a node of operator "A"
    for name in files.values():
        (tmp_path / "graphs" / name).write_bytes(bytes([0x3A, 2 * len(node), *node, *node]))
    return Workspace(tmp_path)


def engines(work: Workspace, backend: str, **details: Any) -> None:
    roles = (("vision",), ("reduce",), ("prefill",), ("decode",))
    records = [EngineRecord(r, f"{r[0]}.engine", "", 1000, 1.5, 300.0, backend, details) for r in roles]
    work.write("engines/engines.json", json.dumps([asdict(r) for r in records]))


def validation(work: Workspace, **changes: Any) -> None:
    row = {"cosine": None, "max_abs": None, "relative": None, "agreement": None, "gate": "", "passed": None}
    record = {
        "executed": "ONNX Runtime, CPU",
        "questions": 4,
        "fidelity": [
            {**row, "stage": "vision", "cosine": 0.5, "max_abs": 2.0},
            {**row, "stage": "kept tokens", "agreement": 0.75, "gate": "overlap ≥ 0.9", "passed": False},
            {**row, "stage": "greedy tokens", "agreement": 1.0, "gate": "agreement ≥ 0.9", "passed": True},
        ],
        "quality": [{"variant": "engine", "label": "reduced, engine cpu_int4", "scores": {"cell": [3, 4]}}],
        "failed": ["kept tokens: overlap ≥ 0.9 asked, found 0.7500"],
        "notes": ["fidelity: measured on synthetic images"],
        "samples": [{"kind": "cell", "question": "Which?", "expected": "7", "answers": {"unreduced": "1"}}],
    }
    work.write("evidence/validation.json", json.dumps(record | changes))


def latency(work: Workspace, variants: tuple[str, ...]) -> None:
    stages = {s: {"median_ms": i + 1.0, "p90_ms": i + 2.0, "p99_ms": 9.0, "rounds": 3} for i, s in enumerate(STAGES)}
    record = {
        "executed": "ONNX Runtime, CPU", "machine": MACHINE, "versions": {"numpy": "2"}, "threads": None, "rounds": 3,
        "new_tokens": 4, "variants": dict.fromkeys(variants, stages),
    }  # fmt: skip
    work.write("evidence/latency.json", json.dumps(record))


STAGES = ("vision", "reduce", "prefill", "decode", "ttft")


def test_an_exported_folder(work: Workspace) -> None:
    data = report.collect(work, JOB)
    assert (data.title, data.unreduced_tokens, data.kept_tokens) == ("model: uniform + fastv", 16, 4)
    assert data.precision == "INT4 weights, FP32"
    assert [(r.place, r.before, r.after) for r in data.reductions] == [
        ("before the language model", 16, 8),
        ("inside the language model", 8, 4),
    ]
    assert [(s.name, s.nodes, s.built, s.executed) for s in data.stages] == [
        (role, 2, False, False) for role in ("vision", "reduce", "prefill", "decode")
    ]
    assert data.stages[0].engine_bytes == "`edgetrim build` has not run on this folder."
    assert (data.fidelity, data.quality, data.latency, data.ttft) == ([], [], [], None)
    assert data.notes == [
        "Fidelity and quality: not measured; `edgetrim validate` has not run on this folder.",
        "Latency: not measured; `edgetrim bench` has not run on this folder.",
    ]
    assert data.command == (
        "edgetrim run owner/model --reduce uniform:keep=8 --reduce fastv:layer=1,keep=4 --profile cpu_int4 -o out/"
    )


def test_engines_that_only_the_device_can_build(work: Workspace) -> None:
    job = Job("m", (), "orin_nano_8gb_int4")
    reason = report.collect(work, job).stages[0].engine_bytes
    assert isinstance(reason, str)
    assert reason
    assert "edgetrim build` has not run" not in reason


def test_engines_that_ran(work: Workspace) -> None:
    engines(work, "ort")
    assert [s.executed for s in report.collect(work, JOB).stages] == [False] * 4
    validation(work)
    assert [s.executed for s in report.collect(work, JOB).stages] == [True] * 4


def test_tensorrt_engines_are_said_to_have_run_where_they_did(work: Workspace) -> None:
    engines(work, "trt", module="tensorrt_rtx", version="1.7", compute_capabilities=[80, 120])
    validation(work)
    data = report.collect(work, Job("m", JOB.reductions, "rtx_int4"))
    assert [(s.executed, s.built, s.note) for s in data.stages] == [
        (False, True, "tensorrt_rtx 1.7, for SM 8.0, SM 12.0")
    ] * 4
    assert data.notes[-1] == (
        "Every measured number is from ONNX Runtime, CPU: it checks the graphs, and says nothing about the speed of rtx_int4."
    )
    assert "4 of 4 engines built, not run here" in pages.render(data)
    validation(work, executed="tensorrt_rtx 1.7, NVIDIA L4")
    data = report.collect(work, Job("m", JOB.reductions, "rtx_int4"))
    assert all(s.executed for s in data.stages)
    assert not any(note.startswith("Every measured number") for note in data.notes)


def test_evidence(work: Workspace) -> None:
    validation(work)
    latency(work, ("engine_reduced", "reference_reduced", "reference_unreduced"))
    data = report.collect(work, JOB)
    assert data.device == "Some CPU (2 cores), ONNX Runtime, CPU"
    assert data.fidelity[0] == pages.Fidelity("vision", 0.5, 2.0, "", "", "", None)
    assert data.fidelity[1] == pages.Fidelity("kept tokens", "", "", 0.75, "", "overlap ≥ 0.9", False)
    assert data.fidelity[2] == pages.Fidelity("greedy tokens", "", "", "", 1.0, "agreement ≥ 0.9", True)
    assert data.quality[0].scores == {"cell": pages.Score(3, 4)}
    assert [row.stage for row in data.latency] == ["vision", "reduce", "prefill"]
    assert data.latency[0].engine_reduced == pages.Timing(1.0, 2.0)
    assert data.latency[0].engine_unreduced == "left out by `--no-compare`."
    assert (data.ttft and data.ttft.stage, data.token and data.token.stage) == ("ttft", "decode")
    assert data.notes == [
        "Fidelity: measured on synthetic images.",
        "Gate failed: kept tokens: overlap ≥ 0.9 asked, found 0.7500.",
        "Latency: batch 1, a random image, 3 rounds after 2 to warm up, all variants in turn in one process, 4 tokens each, "
        "the runtime's own choice of threads; load average 0.5 when it was written.",
    ]


def test_a_bundle_that_reduces_nothing(work: Workspace) -> None:
    latency(work, ("engine_unreduced",))
    data = report.collect(work, Job("m", (), "cpu_int4"))
    assert data.latency[0].engine_reduced == "this bundle reduces nothing."


def test_curves_overlays_and_other_engines(work: Workspace) -> None:
    points = [{"keep_ratio": 0.5, "spec": "uniform:keep=8", "accuracy": {"cell": 0.75}}]
    curves = [
        {"method": "uniform", "template": "", "control": True, "points": points},
        {"method": "lftr", "template": "", "control": False, "points": []},
    ]
    work.write("evidence/curves.json", json.dumps({"full": {"cell": 1.0}, "per_kind": 60, "curves": curves}))
    (work.evidence / "overlays").mkdir()
    (work.evidence / "overlays" / "1.png").write_bytes(b"png")
    listed = [{"method": "uniform:keep=8", "caption": "Which?", "files": ["1.png", "../../job.json"]}]
    work.write("evidence/overlays.json", json.dumps(listed))
    entry = {
        "roles": ["vision"], "profile": "rtx_fp16", "nodes": 5, "graph_bytes": 7, "backend": "trt", "engine_bytes": 9,
        "build_s": 1.0, "peak_rss_mib": 2.0, "stack": "tensorrt_rtx 1.7", "capabilities": [],
    }  # fmt: skip
    work.write(report.OTHER_ENGINES, json.dumps([entry]))
    data = report.collect(work, JOB)
    assert data.curves == [pages.Curve("uniform", [pages.CurvePoint(0.5, {"cell": 0.75})], control=True)]
    assert data.full_accuracy == {"cell": 1.0}
    assert data.overlays == [pages.Overlay("Which?", "uniform:keep=8", [b"png"])], "only files of the overlays folder"
    assert data.stages[-1] == pages.Stage("vision · rtx_fp16", 5, 7, 9, 1.0, 2.0, False, "tensorrt_rtx 1.7")


@pytest.mark.parametrize(
    ("name", "text"), [("validation", "{"), ("latency", '{"variants": 3}'), ("curves", '{"full": 3}')]
)
def test_damaged_evidence(work: Workspace, name: str, text: str) -> None:
    work.write(f"evidence/{name}.json", text)
    with pytest.raises(VerificationError, match="damaged"):
        report.write_report(work, JOB)
    assert not (work.folder / "report.html").exists()


def test_it_is_written_beside_and_renamed(work: Workspace) -> None:
    path = report.write_report(work, JOB)
    assert path == work.folder / "report.html"
    assert path.read_text().startswith("<!doctype html>")
    assert [p.name for p in work.folder.iterdir() if p.name.startswith(".")] == []


def test_what_got_worse_is_shown_with_its_picture(work: Workspace) -> None:
    shown = {
        "number": 3, "cause": "precision", "kind": "count", "question": "How many <b>?", "expected": "2", "images": [],
        "answers": {"unreduced": "2", "engine": "3"}, "file": "../../3.png",
    }  # fmt: skip
    gone = {**shown, "file": "4.png"}
    validation(work, regressions={"causes": {"precision": 2}, "shown": [shown, gone]})
    folder = work.evidence / "regressions"
    folder.mkdir()
    (folder / "3.png").write_bytes(PNG)
    data = report.collect(work, JOB)
    assert [(r.question, r.cause, r.answers, r.image) for r in data.regressions] == [
        ("How many <b>?", "precision", shown["answers"], PNG)
    ]
    page = pages.render(data)
    assert "2 by the precision; the first 1." in page
    assert "How many &lt;b&gt;?" in page and "engine: 3" in page
    assert page.count("data:image/png;base64,") == 1


def test_nothing_worse_is_no_section(work: Workspace) -> None:
    validation(work, regressions={"causes": {}, "shown": []})
    assert 'id="regressions"' not in pages.render(report.collect(work, JOB))
