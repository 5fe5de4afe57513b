"""The question through CLIP's text tower, from its text to the kept tokens: exported graph, runtime, evidence, engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporter.backends.ort import OnnxRuntime
from exporter.checkpoint import Checkpoint
from exporter.cli import _results
from exporter.engines import engine_records, open_runners
from exporter.errors import UsageError
from exporter.families._contract import Request
from exporter.job import Job
from exporter.pipeline import run_bench, run_build, run_export, run_pack, run_validate
from exporter.report import ReportData
from exporter.runtime.generate import Generator
from exporter.runtime.question import QuestionTokenizer
from exporter.runtime.sequence import split
from exporter.stages import report
from exporter.stages._reference import reference
from exporter.stages.validate import cosine
from exporter.workspace import Workspace
from profiles import _schema
from tests.conftest import for_one_gpu, needs_rtx
from tests.families import tiny
from tests.stages.conftest import Engine, Export

SPEC = "trim:keep=6,text=clip"
TEXTS = ["how many?", "what is in the image, and how many of it are there"]


@pytest.fixture
def ids(clip: Path) -> Any:
    """TEXTS; the second is longer than the tower takes."""
    return QuestionTokenizer.load(clip).encode(TEXTS)


def sample(generator: Generator) -> tuple[Any, Any]:
    """The same image and prompt twice."""
    asked = tiny.question(generator.graphs)
    return np.concatenate([asked.pixels] * 2), [asked.prompt] * 2


@pytest.mark.parametrize("spec", [SPEC, "cdpruner:keep=6,relevance=clip"])
def test_each_sample_is_reduced_for_its_own_question(spec: str, ids: Any, exported: Export, engine: Engine) -> None:
    case = exported("llava", (spec,))
    assert (case.graphs.side, case.graphs.question_tokens) == ({"aligned_text": [24]}, tiny.QUESTION_TOKENS)
    theirs, ours = case.theirs(), engine(case)
    pixels, prompts = sample(ours)
    result = ours.generate(pixels, prompts, 4, side={"question_ids": ids})
    expected = theirs.generate(pixels, prompts, 4, side={"question_ids": ids})
    assert (result.index == expected.index).all()
    assert result.tokens == expected.tokens
    assert (result.index[0] != result.index[1]).any(), "the question must matter"
    assert result.timings.question_ms > 0
    for row in (0, 1):
        one = slice(row, row + 1)
        alone = ours.generate(pixels[one], prompts[one], 4, side={"question_ids": ids[one]})
        assert (alone.index == result.index[one]).all()
    given = {"aligned_text": ours.question(ids)}
    again = ours.reduce(ours.vision(pixels), split(prompts, ours.graphs), given)
    assert (again.index == result.index).all()


def test_what_the_generator_refuses(ids: Any, exported: Export, engine: Engine) -> None:
    ours = engine(exported("llava", (SPEC,)))
    pixels, prompts = sample(ours)
    for side, message in (
        (None, "needs `question_ids`; give it to `generate`"),
        ({"question_ids": ids[:1]}, "`aligned_text` is for 1 samples; expected 2"),
        ({"question_ids": ids[:, :5]}, r"question_ids has shape \[2, 5\]; this model was exported for \[batch, 12\]"),
    ):
        with pytest.raises(UsageError, match=message):
            ours.generate(pixels, prompts, 1, side=side)
    with pytest.raises(UsageError, match="No runner for question"):
        Generator(dict.fromkeys(("vision", "reduce", "prefill", "decode"), ours._vision), ours.graphs, ours._embedding)
    without = engine(exported("llava", ("uniform:keep=6",)))
    with pytest.raises(UsageError, match="leave `question_ids` out"):
        without.question(ids)
    assert without.generate(pixels, prompts, 1, side={"question_ids": ids}).timings.question_ms == 0


@pytest.mark.parametrize("profile", ["rtx_fp16", "rtx_int4"])
def test_the_text_tower_is_never_quantised(profile: str, ids: Any, exported: Export) -> None:
    case = exported("llava", (SPEC,), profile=profile)
    model = onnx.load(case.folder / "question.onnx", load_external_data=False)
    assert not [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    (out,) = model.graph.output
    assert out.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    with OnnxRuntime(threads=1).runner(case.folder / "question.onnx") as runner:
        found = runner.numpy(runner.run({"question_ids": ids})["aligned_text"])
    runners, _, _ = reference(case.plan)
    expected = runners["question"].run({"question_ids": ids})["aligned_text"].numpy()
    assert min(cosine(f, e) for f, e in zip(found, expected, strict=True)) > 0.9999


def test_evidence(checkpoints: dict[str, Path], clip: Path, tmp_path: Path) -> None:
    """Without questions or a tokenizer of the model's own: fidelity and latency have a row for the new stage."""
    work = Workspace(tmp_path)
    job = Job(str(checkpoints["llava"]), (SPEC,), "cpu_fp32", clip=str(clip))
    run_export(job, work)
    assert Job.read(work) == job
    run_build(work)
    record = run_validate(work, threads=1)
    rows = {row["stage"]: row for row in record["fidelity"]}
    assert rows["question"]["cosine"] > 0.99999
    assert rows["kept tokens"]["agreement"] == 1
    variants = run_bench(work, rounds=1, new_tokens=2, threads=1)["variants"]
    assert [name for name, stages in variants.items() if "question" in stages] == [
        "engine_reduced",
        "reference_reduced",
    ]
    data: ReportData = report.collect(work, job)
    (row,) = [r for r in data.latency if r.stage == "question"]
    assert row.engine_unreduced == row.reference_unreduced == "the unreduced model has no such stage."
    assert [s.name for s in data.stages] == ["vision", "question", "reduce", "prefill and decode"]
    assert f"--clip-model {clip}" in data.command
    bundle = run_pack(work)
    assert {"graphs/question.onnx", "graphs/question.data", "graphs/processor/clip/tokenizer.json"} <= set(
        bundle.manifest["files"]
    )
    assert bundle.manifest["clip"] == str(clip)
    assert _results.summary(work).data["latency"]["variants"] == variants
    with open_runners(tmp_path, _schema.load("cpu_fp32")) as (runners, _, _, _):
        assert list(runners) == ["vision", "question", "reduce", "prefill", "decode"]


@needs_rtx
def test_tensorrt_rtx_builds_it(checkpoints: dict[str, Path], clip: Path, tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    run_export(Job(str(checkpoints["llava"]), (SPEC,), for_one_gpu("rtx_fp16", tmp_path), clip=str(clip)), work)
    records = run_build(work)
    assert [r.roles for r in records] == [("vision",), ("question",), ("reduce",), ("prefill", "decode")]
    assert engine_records(work) == records
    assert (work.engines / "question.engine").read_bytes()[:4] == b"vtrt"


def test_the_same_input_gives_the_same_bytes(exported: Export, clip: Path, tmp_path: Path) -> None:
    from exporter.stages.export import export

    case = exported("llava", (SPEC,))
    plan = tiny.plan(case.plan.checkpoint.folder, (SPEC,), Request(1, None, Checkpoint(clip)))
    export(plan, tmp_path)
    for name in ("question.onnx", "question.data", "vision.onnx", "vision.data"):
        assert (tmp_path / name).read_bytes() == (case.folder / name).read_bytes()
