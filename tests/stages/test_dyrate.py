"""A reduction that goes on while decoding: its engines against PyTorch, and against Hugging Face's layers without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration

from graphs._contract import Site
from graphs.dyrate import DyRate
from tests.families import hugging_face, tiny
from tests.stages.conftest import Engine, Export

ANSWER = 64
LAYER, KEEP, BUCKETS = 2, 12, {3: 7, 20: 2}
SCHEDULE = f"dyrate:layer={LAYER},keep={KEEP},step_list=3+20,keep_list=7+2"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """GRU width → a classifier whose rates depend on the step."""
    found = {}
    for state in (0, 6):
        draw = torch.Generator().manual_seed(4)
        method = DyRate(weights="-", state=state)
        tensors = {n: 4 * torch.randn(s, generator=draw) for n, s in method.trained(Site(16)).items()}
        if not state:  # the more the answer is looked at, the higher the rate
            tensors["weight"] = torch.linspace(-1, 1, 10) * torch.tensor([0.0, 0.0, 0.0, 30.0])[:, None]
            tensors["bias"] = torch.linspace(3, -3, 10)
        found[state] = tmp_path_factory.mktemp("dyrate") / "weights.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, found[state])
    return found


def specs(weights: dict[int, Path]) -> dict[str, str]:
    return {
        "schedule": SCHEDULE,
        "linear": f"{SCHEDULE},weights={weights[0]}",
        "gru": f"{SCHEDULE},weights={weights[6]},state=6",
    }


@pytest.mark.parametrize(
    ("family", "kind"), [("llava", "schedule"), ("llava", "linear"), ("llava", "gru"), ("qwen2_5_vl", "schedule")]
)
def test_onnx_runtime_equals_pytorch(
    family: str, kind: str, weights: dict[int, Path], exported: Export, engine: Engine
) -> None:
    case = exported(family, (specs(weights)[kind],))
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 1, (20, 21, 22, 23, 24))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    theirs, ours = case.theirs().generate(pixels, prompts, ANSWER), engine(case).generate(pixels, prompts, ANSWER)
    assert ours.tokens == theirs.tokens
    assert ours.cache.shrunk is not None and theirs.cache.shrunk is not None
    assert ours.cache.shrunk.cuts == theirs.cache.shrunk.cuts
    if kind == "schedule":
        assert ours.cache.shrunk.cuts == list(BUCKETS.items())
    if kind == "linear":
        assert ours.cache.shrunk.cuts, "a classifier that never cuts shows nothing"
    text = case.graphs.text
    length = {g: ours.cache.past[f"past_order_{g}"].shape()[1] for g in (0, 1)}
    left = ours.cache.shrunk.cuts[-1][1] if ours.cache.shrunk.cuts else KEEP
    assert length[0] - length[1] == text.kept[0] - left


def test_a_shared_schedule_waits_for_every_row(weights: dict[int, Path], exported: Export, engine: Engine) -> None:
    """A batch is cut when all of its rows allow it, and not before."""
    case = exported("llava", (specs(weights)["linear"],))
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 3, (20, 21, 22, 23, 24))]
    ours = engine(case)
    alone = [ours.generate(q.pixels, [q.prompt], ANSWER).cache.shrunk for q in asked]
    both = ours.generate(np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked], ANSWER).cache.shrunk
    assert both is not None
    firsts = [a.cuts[0][0] if a is not None and a.cuts else ANSWER for a in alone]
    assert (both.cuts[0][0] if both.cuts else ANSWER) >= max(firsts)


def test_against_a_loop_without_cache(exported: Export, engine: Engine) -> None:
    """Hugging Face's layers, everything anew for every token: the choice in prefill and at both buckets made here."""
    case = exported("llava", (SCHEDULE,))
    asked = tiny.question(case.graphs)
    model = LlavaForConditionalGeneration.from_pretrained(
        case.plan.checkpoint.folder, attn_implementation="eager"
    ).eval()
    ours = engine(case)
    features = ours.reduce(ours.vision(asked.pixels)).embeds
    assert ours.generate(asked.pixels, [asked.prompt], ANSWER).tokens == [loop(model, asked, features, case.graphs)]


@torch.no_grad()
def loop(model: Any, asked: tiny.Question, features: Any, graphs: Any) -> list[int]:
    """Greedy tokens. What a token sees from LAYER on was settled when it ran."""
    text = model.model.language_model
    ids = hugging_face.arguments(asked, graphs)["input_ids"][0].tolist()
    visual = [p for p, token in enumerate(ids) if token == graphs.text.image_token]
    embeds = text.embed_tokens(torch.tensor([ids]))
    embeds[:, visual] = torch.from_numpy(features)
    prompt, tokens, chosen, present = len(ids), [], [], visual
    while len(tokens) < ANSWER:
        n = embeds.shape[1]
        causal = torch.full((n, n), -1e30).triu(1)
        rotary = text.rotary_emb(embeds, torch.arange(n)[None])
        x, row = embeds, None
        for i, block in enumerate(text.layers):
            mask = causal.clone()
            if i == LAYER and not chosen:
                assert row is not None
                present = best(row, present, KEEP)
                chosen = [present] * prompt
            if i >= LAYER:
                for query in range(n):
                    mask[query, [p for p in visual if p not in chosen[query] and p != query]] = -1e30
            out, weight = block.self_attn(
                block.input_layernorm(x), position_embeddings=rotary, attention_mask=mask[None, None]
            )
            row = weight[0].mean(0)[-1] if i == LAYER - 1 else row
            x = x + out
            x = x + block.mlp(block.post_attention_layernorm(x))
        tokens.append(int(model.lm_head(text.norm(x)[:, -1]).argmax()))
        embeds = torch.cat([embeds, text.embed_tokens(torch.tensor([tokens[-1:]]))], 1)
        assert row is not None
        if n - prompt in BUCKETS:  # so many have run: the next one sees what the newest looked at
            present = best(row, present, BUCKETS[n - prompt])
        chosen.append(present)
    return tokens


def best(row: torch.Tensor, present: list[int], keep: int) -> list[int]:
    return sorted(sorted(present, key=lambda p: (-float(row[p]), p))[:keep])
