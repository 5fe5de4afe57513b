"""The question through a Q-Former's own tokenizer, from its text to the tokens it finds: runtime, exported graph, engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from exporter.checkpoint import INSTRUCTION_FOLDER
from exporter.errors import CheckpointError, UsageError
from exporter.families._contract import Request
from exporter.graphset import GraphSet
from exporter.job import Job
from exporter.pipeline import run_bench, run_build, run_export, run_validate
from exporter.runtime.question import InstructionTokenizer, readers
from exporter.stages.export import export
from exporter.workspace import Workspace
from tests.conftest import for_one_gpu, needs_rtx
from tests.families import tiny
from tests.stages.conftest import Engine, Exported

SPEC = "qformer_text:layers=2,width=16,heads=2,queries=4,vocab=32,positions=128"
OF_CLIPS = "llamavid:layers=2,width=16,heads=2,queries=4,vocab=32,positions=128,content=2"
TEXTS = ["how?", "a b c " * 60]
"""The second is longer than 128 tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA that has such a tokenizer."""
    found = tmp_path_factory.mktemp("guided")
    tiny.llava(found)
    tiny.bert_tokenizer(found)
    return found


@pytest.fixture(scope="module")
def spec(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    (step,) = tiny.unchecked(folder, (SPEC,)).steps
    return f"{SPEC},weights={tiny.weights(step, tmp_path_factory.mktemp('weights') / 'w.safetensors')}"


@pytest.fixture(scope="module")
def case(folder: Path, spec: str, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    plan, out = tiny.plan(folder, (spec,)), tmp_path_factory.mktemp("graphs")
    return Exported(plan, out, export(plan, out))


def test_tokens_are_hugging_faces(folder: Path) -> None:
    file = str(folder / INSTRUCTION_FOLDER / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=file, pad_token="[PAD]")
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=128)
    (reader,) = readers(folder)
    found = reader.side(TEXTS)
    assert list(found) == ["instruction_ids", "instruction_mask"]
    assert (found["instruction_ids"] == expected["input_ids"]).all()
    assert (found["instruction_mask"] == expected["attention_mask"]).all()
    assert found["instruction_mask"].sum(1).tolist() == [4, 128]


def test_each_sample_is_reduced_for_its_own_question(case: Exported, engine: Engine) -> None:
    assert case.graphs.side == {"instruction_ids": [128], "instruction_mask": [128]}
    assert case.graphs.reads_text
    assert GraphSet.load(case.folder) == case.graphs
    (reader,) = readers(case.folder / "processor")
    theirs, ours = case.theirs(), engine(case)
    asked, side = tiny.question(ours.graphs), reader.side(TEXTS)
    pixels, prompts = np.concatenate([asked.pixels] * 2), [asked.prompt] * 2
    found = ours.generate(pixels, prompts, 32, side=side)
    assert found.tokens == theirs.generate(pixels, prompts, 32, side=side).tokens
    embeds = ours.reduce(ours.vision(pixels), None, side).embeds
    expected = theirs.reduce(theirs.vision(pixels), None, side).embeds
    np.testing.assert_allclose(embeds, expected, atol=1e-4)
    assert np.abs(embeds[0] - embeds[1]).max() > 1e-2, "the question must matter"
    with pytest.raises(UsageError, match="needs `instruction_ids`; give it to `generate`"):
        ours.generate(pixels, prompts, 1)


def test_each_frame_of_a_clip_has_a_token_that_the_question_asks_for(
    folder: Path, engine: Engine, tmp_path: Path
) -> None:
    (step,) = tiny.unchecked(folder, (OF_CLIPS,), Request(3)).steps
    plan = tiny.plan(folder, (f"{OF_CLIPS},weights={tiny.weights(step, tmp_path / 'w.safetensors')}",), Request(3))
    out = tmp_path / "graphs"
    out.mkdir()
    case = Exported(plan, out, export(plan, out))
    theirs, ours = case.theirs(), engine(case)
    (reader,), asked = readers(out / "processor"), tiny.question(ours.graphs)
    found = []
    for text in TEXTS:
        side = reader.side([text])
        answer = ours.generate(asked.pixels, [asked.prompt], 32, side=side)
        assert answer.tokens == theirs.generate(asked.pixels, [asked.prompt], 32, side=side).tokens
        found.append(ours.reduce(ours.vision(asked.pixels), None, side).embeds.reshape(3, 5, -1))
    one, other = found
    assert (one[:, 1:] == other[:, 1:]).all()
    assert np.abs(one[:, 0] - other[:, 0]).max(-1).min() > 1e-5


def test_the_tokenizer_is_asked_for_before_anything_is_written(folder: Path, spec: str, tmp_path: Path) -> None:
    """Without it in the checkpoint, or with one that cannot pad."""
    without = tmp_path / "without"
    shutil.copytree(folder, without, ignore=shutil.ignore_patterns(INSTRUCTION_FOLDER))
    with pytest.raises(UsageError, match=f"tokenizer in their folder `{INSTRUCTION_FOLDER}` give `instruction_ids`"):
        tiny.plan(without, (spec,))
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = broken / INSTRUCTION_FOLDER / "tokenizer.json"
    file.write_text(file.read_text().replace("[PAD]", "[NONE]"))
    with pytest.raises(CheckpointError, match=r"The Q-Former's tokenizer.json has no padding token '\[PAD\]'"):
        InstructionTokenizer.load(file.parent)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match="no padding token"):
        export(tiny.plan(broken, (spec,)), out)
    assert not list(out.iterdir())


def test_evidence(folder: Path, spec: str, tmp_path: Path) -> None:
    """Fidelity and latency ask questions of their own."""
    work = Workspace(tmp_path)
    run_export(Job(str(folder), (spec,), "cpu_fp32"), work)
    run_build(work)
    rows: dict[str, Any] = {row["stage"]: row for row in run_validate(work, threads=1)["fidelity"]}
    assert rows["reduce"]["cosine"] > 0.99999
    assert run_bench(work, rounds=1, new_tokens=2, threads=1)["variants"]


@needs_rtx
def test_tensorrt_rtx_builds_it(folder: Path, spec: str, tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    run_export(Job(str(folder), (spec,), for_one_gpu("rtx_fp16", tmp_path)), work)
    run_build(work)
    assert (work.engines / "reduce.engine").read_bytes()[:4] == b"vtrt"
