"""Tokens that skip layers: the engine against PyTorch, and against the official order of operations on Hugging Face's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from exporter.errors import UsageError
from tests.families import hugging_face, tiny
from tests.stages import uncached
from tests.stages.conftest import Engine, Export

ANSWER, LAYERS, COUNTS = 64, (1, 2, 3), (12, 4, 2)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = torch.Generator().manual_seed(0)
    file = tmp_path_factory.mktemp("pmod") / "router.safetensors"
    save_file({"weight": torch.randn(3, 64, generator=draw) * 0.1, "bias": torch.randn(3, generator=draw) * 0.1}, file)
    return file


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_onnx_runtime_equals_pytorch(family: str, router: Path, exported: Export, engine: Engine) -> None:
    case = exported(family, (f"pmod:weights={router}",))
    assert case.graphs.text.groups == [0, 1, 2, 3]
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 1, (20, 21, 22, 23, 24))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    theirs, ours = case.theirs().generate(pixels, prompts, ANSWER), engine(case).generate(pixels, prompts, ANSWER)
    assert ours.tokens == theirs.tokens
    for name, kept in theirs.kept.items():
        assert (ours.kept[name] == kept).all()


def test_against_the_official_order_of_operations(router: Path, exported: Export, engine: Engine) -> None:
    from safetensors.torch import load_file

    case = exported("llava", (f"pmod:weights={router}",))
    assert case.graphs.text.kept == [16, *COUNTS]
    ours, asked = engine(case), tiny.question(case.graphs)
    model = uncached.load("llava", case.plan.checkpoint.folder)
    features = torch.from_numpy(ours.reduce(ours.vision(asked.pixels)).embeds)
    expected = loop(model, asked, features, case.graphs, load_file(router))
    assert ours.generate(asked.pixels, [asked.prompt], ANSWER).tokens == [expected]


@torch.no_grad()
def loop(model: Any, asked: tiny.Question, features: Tensor, graphs: Any, router: dict[str, Tensor]) -> list[int]:
    """Greedy tokens, everything anew for every token; what is routed was settled by the prompt alone."""
    text = model.model.language_model
    ids = hugging_face.arguments(asked, graphs)["input_ids"][0].tolist()
    visual = torch.tensor([token == graphs.text.image_token for token in ids])
    embeds = text.embed_tokens(torch.tensor([ids]))
    embeds[:, visual] = features
    tokens: list[int] = []
    while len(tokens) < ANSWER:
        n = embeds.shape[1]
        is_visual = torch.cat([visual, torch.zeros(n - len(ids), dtype=torch.bool)])
        x = embeds
        for i, block in enumerate(text.layers):
            logits = torch.full((n,), float("-inf"))
            kept = torch.ones(n, dtype=torch.bool)
            if i in LAYERS:
                row = LAYERS.index(i)
                logits[is_visual] = x[0, is_visual] @ router["weight"][row] + router["bias"][row]
                kept = ~is_visual
                kept[logits.topk(COUNTS[row]).indices] = True
            weight = torch.tanh(logits) * 0.2 + 1
            some, places = x[:, kept], torch.arange(n)[None, kept]
            m = some.shape[1]
            mask = torch.full((m, m), -1e30).triu(1)[None, None]
            rotary = text.rotary_emb(some, places)
            out, _ = block.self_attn(block.input_layernorm(some), position_embeddings=rotary, attention_mask=mask)
            residual = some + out
            x = x.clone()
            x[:, kept] = block.mlp(block.post_attention_layernorm(residual))
            if i in LAYERS:
                x[:, is_visual] *= weight[is_visual, None]
            x[:, kept] += residual
        tokens.append(int(model.lm_head(text.norm(x)[:, -1]).argmax()))
        embeds = torch.cat([embeds, text.embed_tokens(torch.tensor([tokens[-1:]]))], 1)
    return tokens


@pytest.mark.parametrize("other", ["fastv:layer=1,keep=4", "lookm:keep=4"])
def test_nothing_else_acts_inside(other: str, router: Path, checkpoints: dict[str, Path]) -> None:
    spec = f"pmod:weights={router}"
    for specs in ((spec, other), (other, spec)):
        with pytest.raises(UsageError, match="Give one of the two"):
            tiny.plan(checkpoints["llava"], specs)
    save_file({"weight": torch.zeros(3, 8), "bias": torch.zeros(3)}, router.with_name("wrong.safetensors"))
    with pytest.raises(UsageError, match=r"does not fit this model. Expected `weight` \[3, 64\] \(found \[3, 8\]\)"):
        tiny.plan(checkpoints["llava"], (f"pmod:weights={router.with_name('wrong.safetensors')}",))
