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
from tests.families import hugging_face, tiny

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
    stack, arguments = Layers(model), hugging_face.arguments(asked, ours.graphs)
    ids = arguments["input_ids"][0].tolist()
    visual = [p for p, token in enumerate(ids) if token == ours.graphs.text.image_token]
    embeds = stack.embed(ids)
    embeds[:, visual] = torch.from_numpy(ours.reduce(ours.vision(asked.pixels)).embeds)
    positions = _positions(model, arguments)
    tokens: list[int] = []
    chosen: dict[int, list[int]] = {}
    while len(tokens) < length:
        places, order, present = positions, torch.arange(embeds.shape[1]), visual
        x, before = stack.entering(embeds, places), torch.empty(0)
        for i in range(len(stack)):
            if i in layers:
                if not tokens:
                    at = [n for n, p in enumerate(order.tolist()) if p in present]
                    ahead = stack.run(i, x, places, order)[1]
                    chosen[i] = choose(i, before.mean(0)[-1, at], ahead.mean(0)[-1, at])
                kept = [present[n] for n in chosen[i]]
                stays = [n for n, p in enumerate(order.tolist()) if p not in present or p in kept]
                x, places, order, present = x[:, stays], places[..., stays], order[stays], kept
                if compact:
                    places = torch.arange(len(stays))[None]
            x, before = stack.run(i, x, places, order)
        tokens.append(stack.next(x))
        embeds = torch.cat([embeds, stack.embed(tokens[-1:])], 1)
        positions = torch.cat([positions, positions.amax() + 1 + torch.zeros_like(positions[..., :1])], -1)
    return tokens, chosen


@torch.no_grad()
def answer_with_short_cache(
    model: Any, asked: tiny.Question, ours: Generator, cached: Callable[[int], list[list[int]]], length: int
) -> list[int]:
    """`length` greedy tokens. Of the visual tokens, what is behind the prompt sees in a layer only those that each KV head keeps.

    Args:
        cached: layer → per KV head the visual tokens that stay.
    """
    stack, arguments = Layers(model), hugging_face.arguments(asked, ours.graphs)
    ids = arguments["input_ids"][0].tolist()
    visual = [p for p, token in enumerate(ids) if token == ours.graphs.text.image_token]
    embeds = stack.embed(ids)
    embeds[:, visual] = torch.from_numpy(ours.reduce(ours.vision(asked.pixels)).embeds)
    positions = _positions(model, arguments)
    config = stack.text.config
    group = config.num_attention_heads // config.num_key_value_heads
    gone = [
        [[p for n, p in enumerate(visual) if n not in stay] for stay in cached(layer) for _ in range(group)]
        for layer in range(len(stack))
    ]
    tokens: list[int] = []
    while len(tokens) < length:
        x, seq = stack.entering(embeds, positions), embeds.shape[1]
        for layer, heads in enumerate(gone):
            hidden = torch.zeros(len(heads), seq, seq, dtype=torch.bool)
            for head, places in enumerate(heads):
                hidden[head, len(ids) :, places] = True
            x, _ = stack.run(layer, x, positions, torch.arange(seq), unseen=hidden)
        tokens.append(stack.next(x))
        embeds = torch.cat([embeds, stack.embed(tokens[-1:])], 1)
        positions = torch.cat([positions, positions.amax() + 1 + torch.zeros_like(positions[..., :1])], -1)
    return tokens


def _positions(model: Any, arguments: dict[str, Any]) -> Tensor:
    """int64 [1, tokens], or [3, 1, tokens] where positions have a time, a row and a column."""
    if "mm_token_type_ids" not in arguments:
        return torch.arange(arguments["input_ids"].shape[1])[None]
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{n: arguments[n] for n in names})[0]


class Layers:
    """Hugging Face's decoder layers, one by one, in eager attention with an explicit mask."""

    def __init__(self, model: Any) -> None:
        found = model.model.language_model
        self.text, self.head = getattr(found, "decoder", found), model.lm_head  # OPT's is one deeper

    def __len__(self) -> int:
        return len(self.text.layers)

    def embed(self, ids: list[int]) -> Tensor:
        """[1, tokens, hidden]"""
        found: Tensor = self.text.embed_tokens(torch.tensor([ids]))
        return found

    def entering(self, embeds: Tensor, places: Tensor) -> Tensor:
        """What the first layer gets: with positions, where those are learned."""
        table = getattr(self.text, "embed_positions", None)
        return embeds if table is None else embeds + table(None, position_ids=places)

    def next(self, x: Tensor) -> int:
        norm = getattr(self.text, "norm", None) or self.text.final_layer_norm
        return int(self.head(norm(x)[:, -1]).argmax())

    def run(
        self,
        layer: int,
        x: Tensor,
        places: Tensor,
        order: Tensor,
        bias: Tensor | None = None,
        unseen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One whole layer, and its attention [heads, queries, keys].

        Args:
            order: each token's place in the prompt, which says what it sees. bias: [keys], added to all scores. unseen: what it
                does not see in spite of `order`, bool [heads, queries, keys].
        """
        block = self.text.layers[layer]
        kind = getattr(block.self_attn, "layer_type", None)  # Mistral has one window for all its layers
        window = getattr(self.text.config if kind is None else block.self_attn, "sliding_window", None)
        far = order[:, None] - order[None, :]
        hidden = (far < 0) | (far >= (window or 1 << 30))
        hidden = hidden[None] if unseen is None else hidden | unseen
        mask = torch.where(hidden, -1e30, 0.0 if bias is None else bias)[None]
        kept: list[Tensor] = []
        hook = block.self_attn.register_forward_hook(lambda _, given, out: kept.append(out[1]))
        rotary = self._rotary(layer, x, places)
        out = block(x, attention_mask=mask, **({} if rotary is None else {"position_embeddings": rotary}))
        hook.remove()
        return out, kept[0][0]

    def projected(self, layer: int, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, and keys with their rotation, each [heads, tokens, head_dim], as the layer would make them of x."""
        block = self.text.layers[layer]
        attention, norm = block.self_attn, getattr(block, "input_layernorm", None) or block.self_attn_layer_norm
        parts = []
        for name in "qk":
            part = getattr(attention, f"{name}_proj")(norm(x)).unflatten(-1, (-1, attention.head_dim))
            extra = getattr(attention, f"{name}_norm", None)
            parts.append((part if extra is None else extra(part))[0].transpose(0, 1))
        q, k = parts
        rotary = self._rotary(layer, x, places)
        if rotary is None:
            return q, k, k
        cos, sin = (part[0] for part in rotary)
        a, b = k.chunk(2, -1)
        return q, k, k * cos + torch.cat([-b, a], -1) * sin

    def _rotary(self, layer: int, x: Tensor, places: Tensor) -> Any:
        found = getattr(self.text, "rotary_emb", None)
        if found is None:
            return None
        sets = (self.text.layers[layer].self_attn.layer_type,) if hasattr(found, "layer_types") else ()
        return found(x, places, *sets)
