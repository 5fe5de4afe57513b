"""What Hugging Face's decoder layers answer, called one by one, everything anew for every token: no cache that could hold
the wrong tokens, no graph, none of our code behind the visual features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from exporter.runtime.generate import Generator
from tests.families import tiny

Choose = Callable[[int, Tensor, Tensor], list[int]]
"""(layer, before, ahead) → the visual tokens that enter it, as places among those still present. before, ahead: attention
[present], mean over heads, that the last prompt token pays them in the layer before, and would pay them in this one."""

LOADERS = {
    "llava": transformers.LlavaForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
}


def load(family: str, checkpoint: Path) -> Any:
    """Hugging Face's model, with attention that can be looked at."""
    return LOADERS[family].from_pretrained(checkpoint, attn_implementation="eager").eval()


@torch.no_grad()
def answer(
    model: Any,
    asked: tiny.Question,
    ours: Generator,
    layers: Iterable[int],
    choose: Choose,
    length: int,
    compact: bool = False,
) -> tuple[list[int], dict[int, list[int]]]:
    """`length` greedy tokens, and what was chosen before each of `layers`. compact: from there on positions are counted
    anew. Sliding windows always reach as far as in the whole prompt."""
    text, arguments = model.model.language_model, asked.for_transformers(ours.graphs)
    ids = arguments["input_ids"][0].tolist()
    visual = [p for p, token in enumerate(ids) if token == ours.graphs.text.image_token]
    embeds = text.embed_tokens(torch.tensor([ids]))
    embeds[:, visual] = torch.from_numpy(ours.reduce(ours.vision(asked.pixels)).embeds)
    positions = _positions(model, arguments)
    attention: list[Tensor] = []
    hooks = [b.self_attn.register_forward_hook(lambda _, given, out: attention.append(out[1])) for b in text.layers]
    tokens: list[int] = []
    chosen: dict[int, list[int]] = {}
    while len(tokens) < length:
        x, places, order, present = embeds, positions, torch.arange(embeds.shape[1]), visual
        for i, block in enumerate(text.layers):
            if i in layers:
                if not tokens:
                    at = [n for n, p in enumerate(order.tolist()) if p in present]
                    before = attention[-1][0].mean(0)[-1, at]
                    _run(text, block, x, places, order)
                    chosen[i] = choose(i, before, attention[-1][0].mean(0)[-1, at])
                kept = [present[n] for n in chosen[i]]
                stays = [n for n, p in enumerate(order.tolist()) if p not in present or p in kept]
                x, places, order, present = x[:, stays], places[..., stays], order[stays], kept
                if compact:
                    places = torch.arange(len(stays))[None]
            x = _run(text, block, x, places, order)
        tokens.append(int(model.lm_head(text.norm(x)[:, -1]).argmax()))
        embeds = torch.cat([embeds, text.embed_tokens(torch.tensor([tokens[-1:]]))], 1)
        positions = torch.cat([positions, positions.amax() + 1 + torch.zeros_like(positions[..., :1])], -1)
    for hook in hooks:
        hook.remove()
    return tokens, chosen


@torch.no_grad()
def answer_with_short_cache(
    model: Any, asked: tiny.Question, ours: Generator, cached: Callable[[int], list[list[int]]], length: int
) -> list[int]:
    """`length` greedy tokens. Of the visual tokens, what is behind the prompt sees in a layer only those that each KV head keeps.

    Args:
        cached: layer → per KV head the visual tokens that stay.
    """
    text, arguments = model.model.language_model, asked.for_transformers(ours.graphs)
    ids = arguments["input_ids"][0].tolist()
    visual = [p for p, token in enumerate(ids) if token == ours.graphs.text.image_token]
    embeds = text.embed_tokens(torch.tensor([ids]))
    embeds[:, visual] = torch.from_numpy(ours.reduce(ours.vision(asked.pixels)).embeds)
    positions = _positions(model, arguments)
    group = text.config.num_attention_heads // text.config.num_key_value_heads
    gone = [
        [[p for n, p in enumerate(visual) if n not in stay] for stay in cached(layer) for _ in range(group)]
        for layer in range(len(text.layers))
    ]
    tokens: list[int] = []
    while len(tokens) < length:
        x, seq = embeds, embeds.shape[1]
        for block, heads in zip(text.layers, gone, strict=True):
            hidden = torch.zeros(len(heads), seq, seq, dtype=torch.bool)
            for head, places in enumerate(heads):
                hidden[head, len(ids) :, places] = True
            x = _run(text, block, x, positions, torch.arange(seq), hidden)
        tokens.append(int(model.lm_head(text.norm(x)[:, -1]).argmax()))
        embeds = torch.cat([embeds, text.embed_tokens(torch.tensor([tokens[-1:]]))], 1)
        positions = torch.cat([positions, positions.amax() + 1 + torch.zeros_like(positions[..., :1])], -1)
    return tokens


def _positions(model: Any, arguments: dict[str, Any]) -> Tensor:
    """int64 [1, tokens], or [3, 1, tokens] where positions have a time, a row and a column."""
    if "mm_token_type_ids" not in arguments:
        return torch.arange(arguments["input_ids"].shape[1])[None]
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{n: arguments[n] for n in names})[0]


def _run(text: Any, block: Any, x: Tensor, places: Tensor, order: Tensor, unseen: Tensor | None = None) -> Tensor:
    """One whole layer. order: each token's place in the prompt, which says what it sees. unseen: what it does not see in spite of
    that, bool [heads, queries, keys]."""
    kind = getattr(block.self_attn, "layer_type", None)  # Mistral has one window for all its layers
    window = getattr(text.config if kind is None else block.self_attn, "sliding_window", None)
    far = order[:, None] - order[None, :]
    hidden = (far < 0) | (far >= (window or 1 << 30))
    hidden = hidden[None] if unseen is None else hidden | unseen
    mask = torch.where(hidden, -1e30, 0.0)[None]
    sets = (kind,) if hasattr(text.rotary_emb, "layer_types") else ()  # of rotary frequencies
    return block(x, position_embeddings=text.rotary_emb(x, places, *sets), attention_mask=mask)
