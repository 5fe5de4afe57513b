"""Decoders that are not Llama's, exported: the same answers on ONNX Runtime as from PyTorch. Against Hugging Face's layers one by
one, where tokens are dropped between them: test_inside.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from exporter.stages.export import export
from tests.families import tiny
from tests.stages.conftest import Engine, Exported
from tests.stages.test_fidelity import FORBIDDEN, NEW_TOKENS, TOLERANCE, relative

FASTV = "fastv:layer=2,keep=4"
KINDS = ("qwen3", "gemma", "gemma2", "gemma3_text")
NORMS = {"qwen3": 4 * 4 + 1, "gemma": 4 * 2 + 1, "gemma2": 4 * 4 + 1, "gemma3_text": 4 * 6 + 1}

Build = Callable[..., Exported]


@pytest.fixture(scope="module")
def exported_decoder(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """exported_decoder(kind, reductions, profile="cpu_fp32"): LLaVA with such a decoder, exported once."""
    done: dict[tuple[Any, ...], Exported] = {}

    def run(kind: str, reductions: tuple[str, ...] = (), profile: str = "cpu_fp32") -> Exported:
        key = kind, reductions, profile
        if key not in done:
            checkpoint, folder = tmp_path_factory.mktemp(kind), tmp_path_factory.mktemp("graphs")
            tiny.llava(checkpoint, decoder=kind)
            plan = tiny.plan(checkpoint, reductions, None, profile)
            done[key] = Exported(plan, folder, export(plan, folder))
        return done[key]

    return run


@pytest.mark.parametrize("reductions", [(), (FASTV,)], ids=["all", "fastv"])
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_equals_pytorch(
    kind: str, reductions: tuple[str, ...], exported_decoder: Build, engine: Engine
) -> None:
    case = exported_decoder(kind, reductions)
    theirs, ours = case.theirs(), engine(case)
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 3, (40, 41, 42, 43, 44))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    visual = theirs.reduce(theirs.vision(pixels))
    expected = theirs.generate(pixels, prompts, NEW_TOKENS)
    found, start = ours.prefill(visual, prompts), theirs.prefill(visual, prompts)
    assert relative(found.logits, start.logits) <= TOLERANCE
    assert all((found.kept[name] == kept).all() for name, kept in start.kept.items())
    for step in range(6):
        token = np.array([row[step] for row in expected.tokens])
        assert relative(ours.step(found.cache, token), theirs.step(start.cache, token)) <= TOLERANCE
    assert ours.generate(pixels, prompts, NEW_TOKENS).tokens == expected.tokens
    assert all(len(set(row)) > 4 for row in expected.tokens), "a model that repeats itself shows nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_what_the_model_embeds(kind: str, exported_decoder: Build) -> None:
    """Text embeddings enter the language model scaled, where the decoder scales them; the head stays as it is."""
    case = exported_decoder(kind)
    text = LlavaForConditionalGeneration.from_pretrained(case.plan.checkpoint.folder).model.language_model
    with torch.no_grad():
        expected = text.embed_tokens(torch.arange(tiny.VOCAB)).numpy()
    assert (np.load(case.folder / "embedding.npy") == expected).all()
    assert (case.theirs()._embedding == expected).all()


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_are_plain_and_norms_fuse(kind: str, exported_decoder: Build, tmp_path: Path) -> None:
    case = exported_decoder(kind)
    model = onnx.load(case.folder / "decode.onnx", load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    assert not {n.op_type for n in model.graph.node} & FORBIDDEN
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(case.folder / "decode.onnx", options, ["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    kinds = [n.op_type for n in optimized.graph.node]
    assert sum(k in ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization") for k in kinds) == NORMS[kind]


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_half_precision(kind: str, exported_decoder: Build, engine: Engine) -> None:
    """Near the FP32 reference: norms, capped scores and softmax stay in float32."""
    case = exported_decoder(kind, (), "rtx_fp16")
    asked = tiny.question(case.graphs)
    theirs, ours = case.theirs(), engine(case)
    visual = theirs.reduce(theirs.vision(asked.pixels))
    expected = theirs.prefill(visual, [asked.prompt]).logits
    assert relative(ours.prefill(visual, [asked.prompt]).logits, expected) <= 1e-2
