"""What reductions inside the language model and of its cache are shown, against Hugging Face's layers run in the order of the
prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from exporter.graphset import PAD
from exporter.kv import Inside
from exporter.nn.decoder import Decoder
from exporter.nn.specs import IN_CACHE_SIGNALS, IN_LLM_SIGNALS
from exporter.weights import load
from graphs._blocks import spread
from graphs._contract import InCache, InLLM, Reduced, Signals, Site
from tests.families import tiny

VISUAL, BEFORE, BEHIND, LAYER = 16, 3, 4, 2
SHOWN: dict[str, Tensor] = {}
SHOWN_OF_CACHE: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Spy(InLLM):
    """Notes everything, keeps everything."""

    paper: ClassVar[str] = "none"
    keep: int = field(default=VISUAL)

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(sorted(IN_LLM_SIGNALS))

    @property
    def layers(self) -> tuple[int, ...]:
        return (LAYER,)

    def fit(self, site: Site) -> Spy:
        return self

    def after(self, site: Site) -> Site:
        return site

    def kept(self, layer: int) -> int:
        return VISUAL

    def forward(self, layer: int, signals: Signals) -> Reduced:
        SHOWN.update(signals)
        return Reduced(signals["hidden"], spread(list(range(VISUAL)), signals["hidden"]))


@dataclass(frozen=True)
class CacheSpy(InCache):
    """Notes everything behind the layer before, keeps everything."""

    paper: ClassVar[str] = "none"
    shared: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(sorted(IN_CACHE_SIGNALS))

    @property
    def start(self) -> int:
        return LAYER - 1

    def fit(self, site: Site) -> CacheSpy:
        return self

    def after(self, site: Site) -> Site:
        return site

    def kept(self, layer: int) -> int:
        return VISUAL

    def choose(self, layer: int, signals: Signals) -> Tensor:
        assert layer == self.start
        SHOWN_OF_CACHE.update(signals)
        return spread(list(range(VISUAL)), signals["keys"])


@cache
def seen(folder: Path) -> tuple[Any, Tensor]:
    """Hugging Face's language model, and the embeddings [1, seq, hidden] of the prompt in its order; fills SHOWN and
    SHOWN_OF_CACHE from that prompt with two tokens of padding between image and text."""
    model = tiny.llava(folder)
    text = model.model.language_model
    plan = tiny.plan(folder)
    spec = plan.family.decoder(plan.checkpoint)
    spies = (
        Decoder(spec, Inside(VISUAL, in_llm=(("spy", Spy(position="keep")),)), prunes=True),
        Decoder(spec, Inside(VISUAL, in_cache=(("spy", CacheSpy()),)), prunes=True),
    )
    x = torch.randn(1, BEFORE + VISUAL + BEHIND, 64, generator=torch.Generator().manual_seed(0))
    place = [*range(BEFORE, BEFORE + VISUAL), *range(BEFORE), *range(BEFORE + VISUAL, x.shape[1])]
    pad = torch.full((1, 2), 0)
    inputs = torch.cat([x[:, place[:VISUAL]], 9 * torch.ones(1, 2, 64), x[:, place[VISUAL:]]], 1)
    order = torch.cat([torch.tensor([place[:VISUAL]]), pad + PAD, torch.tensor([place[VISUAL:]])], 1)
    for ours in spies:
        load(ours, "text", plan.checkpoint)
        with torch.inference_mode():
            ours(inputs, torch.where(order == PAD, 0, order), order)
    return text, x


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The signals, from Hugging Face's modules."""
    text, x = seen(tmp_path_factory.mktemp("llava"))
    n, image = x.shape[1], slice(BEFORE, BEFORE + VISUAL)
    words = [*range(BEFORE), *range(BEFORE + VISUAL, n)]
    mask = torch.full((n, n), float("-inf")).triu(1)
    rotary = text.rotary_emb(x, torch.arange(n)[None])

    def heads(layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        block = text.layers[layer]
        normed = block.input_layernorm(hidden)
        q, k = (
            p(normed).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        return q, k

    def rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        found: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, *rotary)
        return found

    def attention(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4
        return (scores if bias is None else scores + bias).softmax(-1)

    with torch.inference_mode():
        entered = [x]
        for block in text.layers[:LAYER]:
            out, _ = block.self_attn(
                block.input_layernorm(entered[-1]), position_embeddings=rotary, attention_mask=mask[None, None]
            )
            y = entered[-1] + out
            entered.append(y + block.mlp(block.post_attention_layernorm(y)))
        before, now = entered[LAYER - 1], entered[LAYER]
        plain_q, plain_k = heads(LAYER - 1, before)
        q, k = rotated(plain_q, plain_k)
        next_plain_q, next_plain_k = heads(LAYER, now)
        next_q, next_k = rotated(next_plain_q, next_plain_k)
        by_head, ahead = attention(q, k, mask), attention(next_q, next_k, mask).mean(1)
        alone = attention(plain_q[:, :, -1:], plain_k[:, :, image], None).mean(1)
        plain, plain_ahead = attention(plain_q, plain_k, mask), attention(next_plain_q, next_plain_k, mask).mean(1)
        ones = torch.ones(1, 1, n, 16)
        turned, _ = rotated(ones, ones)
        response = (turned @ turned.transpose(-1, -2) / 16)[:, 0]
        last = q[:, :, -1:] @ k[:, :, image].repeat_interleave(2, 1).transpose(-1, -2) / 4
    rows = by_head.mean(1)
    by_kv_head = torch.stack([by_head[:, :2].mean(1), by_head[:, 2:].mean(1)], 1)
    return {
        "hidden": now[:, image], "size": torch.ones(1, VISUAL), "previous": before[:, image], "embeds": x[:, image],
        "text_hidden": now[:, words], "text_embeds": x[:, words],
        "text_mask": torch.ones(1, len(words)), "instruction_mask": torch.tensor([[0.0] * BEFORE + [1.0] * BEHIND]),
        "attention_row": rows[:, -1, image], "plain_row": alone[:, 0], "next_row": ahead[:, -1, image],
        "last_scores": last[:, :, 0], "last_log_attention": by_head[:, :, -1, image].log(),
        "text_attention": rows[:, words][..., image], "visual_attention": rows[:, image, image],
        "in_llm head_attention": by_head[:, :, words][..., image], "plain_head_attention": plain[:, :, words][..., image],
        "plain_text_attention": plain.mean(1)[:, words][..., image], "plain_visual_attention": plain.mean(1)[:, image, image],
        "next_plain_row": plain_ahead[:, -1, image], "rope_response": response[:, words][..., image],
        "all_embeds": x[:, image], "places": torch.arange(VISUAL)[None],
        "keys": k[:, :, image], "next_keys": next_k[:, :, image], "next_plain_queries": next_plain_q[:, :, image],
        "next_plain_keys": next_plain_k[:, :, image],
        "received": by_kv_head[..., image].sum(2), "in_cache head_attention": by_kv_head[:, :, words][..., image],
        "behind": torch.tensor([[n - 1 - place for place in words]]),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("place", "name"),
    [*(("in_llm", n) for n in sorted(IN_LLM_SIGNALS)), *(("in_cache", n) for n in sorted(IN_CACHE_SIGNALS))],
)
def test_a_signal_is_what_it_says(place: str, name: str, truth: dict[str, Tensor]) -> None:
    found = (SHOWN if place == "in_llm" else SHOWN_OF_CACHE)[name]
    if name.startswith(("text", "plain_text", "rope")) or name in ("instruction_mask", "behind"):
        if name.endswith("mask"):
            assert (found[:, :2] == 0).all(), "padding is no text"
        if name == "behind":
            assert (found[:, :2] == -1).all(), "padding is nowhere"
        found = found[:, 2:]
    if name.endswith("head_attention"):
        found = found[:, :, 2:]
    torch.testing.assert_close(found, truth.get(name, truth.get(f"{place} {name}")), atol=1e-4, rtol=1e-4)
