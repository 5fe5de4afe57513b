"""What Hugging Face's decoder layers answer, called one by one, everything anew for every token: no cache that could hold
the wrong tokens, no graph, none of our code behind the visual features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from exporter.runtime.generate import Generator
from tests.families import hugging_face, tiny

LOADERS = {
    "llava": transformers.LlavaForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
}


def load(family: str, checkpoint: Path) -> Any:
    """Hugging Face's model, with attention that can be looked at."""
    return LOADERS[family].from_pretrained(checkpoint, attn_implementation="eager").eval()


Stays = Callable[[Tensor, list[int], int], list[list[int]]]
"""(a prompt's attention in a layer [heads, tokens, visual tokens], where these are, KV heads) → per KV head those that stay."""


@torch.no_grad()
def answer_with_short_cache(
    model: Any,
    asked: tiny.Question,
    ours: Generator,
    start: int,
    shared: bool,
    rules: Callable[[int], Stays],
    length: int,
) -> tuple[list[int], dict[int, list[list[int]]]]:
    """`length` greedy tokens, and for every layer that chooses what each KV head keeps. Of the visual tokens, what is behind the
    prompt sees in a layer only those.

    Args:
        start: the first layer whose cache is shortened. shared: whether it chooses for all behind it. rules: of every layer.
    """
    stack, given = Layers(model), Given.of(model, asked, ours)
    chosen: dict[int, list[list[int]]] = {}
    embeds, positions, tokens = given.embeds, given.positions, list[int]()
    while len(tokens) < length:
        x, seq = stack.entering(embeds, positions), embeds.shape[1]
        hidden = torch.zeros(stack.heads, seq, seq, dtype=torch.bool)
        for layer in range(len(stack)):
            for head in range(stack.heads) if tokens and layer >= start else ():
                stay = chosen[start if shared else layer][head // stack.group]
                hidden[head] = False
                hidden[head, given.prompt :, [p for n, p in enumerate(given.visual) if n not in stay]] = True
            x, attention = stack.run(layer, x, positions, torch.arange(seq), unseen=hidden)
            if not tokens and (layer == start or (layer > start and not shared)):
                chosen[layer] = rules(layer)(attention[..., given.visual], given.visual, stack.heads // stack.group)
            x = given.later(x, layer, given.visual)
        tokens.append(stack.next(x))
        embeds, positions = given.longer(stack, embeds, positions, tokens[-1])
    return tokens, chosen


@dataclass(frozen=True)
class Given:
    """A question as the language model gets it, in the order of the prompt.

    embeds: [1, seq, hidden]. positions: int64 [1, seq], or [3, 1, seq]. visual: where its visual tokens are. planes: what is added
    to these behind each of the first layers, [visual, hidden]. prompt: its length.
    """

    embeds: Tensor
    positions: Tensor
    visual: list[int]
    planes: list[Tensor]
    prompt: int

    @classmethod
    def of(cls, model: Any, asked: tiny.Question, ours: Generator) -> Given:
        arguments = hugging_face.arguments(asked, ours.graphs)
        ids = arguments["input_ids"][0].tolist()
        visual = [p for p, token in enumerate(ids) if token == ours.graphs.text.image_token]
        embeds = Layers(model).embed(ids)
        features, *planes = torch.from_numpy(ours.reduce(ours.vision(asked.pixels)).embeds).split(embeds.shape[-1], -1)
        embeds[:, visual] = features
        return cls(embeds, _positions(model, arguments), visual, [plane[0] for plane in planes], len(ids))

    def later(self, x: Tensor, layer: int, present: list[int], at: list[int] | None = None) -> Tensor:
        """x [1, n, hidden] behind a layer, with what is added there. present: places of the visual tokens left; at: in x."""
        if layer >= len(self.planes):
            return x
        x = x.clone()
        x[0, present if at is None else at] += self.planes[layer][[self.visual.index(p) for p in present]]
        return x

    @staticmethod
    def longer(stack: Layers, embeds: Tensor, positions: Tensor, token: int) -> tuple[Tensor, Tensor]:
        """Embeddings and positions with one more token."""
        after = positions.amax() + 1 + torch.zeros_like(positions[..., :1])
        return torch.cat([embeds, stack.embed([token])], 1), torch.cat([positions, after], -1)


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
        self.heads = self.text.config.num_attention_heads
        self.group = self.heads // self.text.config.num_key_value_heads

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
        kept: list[Tensor] = []
        hook = block.self_attn.register_forward_hook(lambda _, given, out: kept.append(out[1]))
        rotary = self.rotary(layer, x, places)
        mask = self._mask(layer, order, bias, unseen)[None]
        out = block(x, attention_mask=mask, **({} if rotary is None else {"position_embeddings": rotary}))
        hook.remove()
        return out, kept[0][0]

    def attended(self, layer: int, *how: Any) -> tuple[Tensor, Tensor]:
        """What leaves a layer, and what its MLP is added to, both [1, n, hidden]; how: as `run` takes it."""
        block, seen = self.text.layers[layer], list[Tensor]()
        names = ("pre_feedforward_layernorm", "final_layer_norm", "post_attention_layernorm")
        before = next(found for found in (getattr(block, name, None) for name in names) if found is not None)
        hook = before.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        out, _ = self.run(layer, *how)
        hook.remove()
        return out, seen[0].reshape(out.shape)  # OPT has its tokens in one row there

    def plain(self, layer: int, x: Tensor, places: Tensor, order: Tensor, bias: Tensor | None = None) -> Tensor:
        """What its softmax would get if nothing were rotated: [heads, queries, keys]."""
        attention = self.text.layers[layer].self_attn
        q, k, _ = self.projected(layer, x, places)
        scores = q @ k.repeat_interleave(self.group, 0).transpose(1, 2) * attention.scaling
        cap = getattr(self.text.config, "attn_logit_softcapping", None)
        return (cap * (scores / cap).tanh() if cap else scores) + self._mask(layer, order, bias)

    def _mask(self, layer: int, order: Tensor, bias: Tensor | None = None, unseen: Tensor | None = None) -> Tensor:
        """[1 or heads, queries, keys]"""
        attention = self.text.layers[layer].self_attn
        kind = getattr(attention, "layer_type", None)  # Mistral has one window for all its layers
        window = getattr(self.text.config if kind is None else attention, "sliding_window", None)
        far = order[:, None] - order[None, :]
        hidden = (far < 0) | (far >= (window or 1 << 30))
        hidden = hidden[None] if unseen is None else hidden | unseen
        return torch.where(hidden, -1e30, 0.0 if bias is None else bias)

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
        rotary = self.rotary(layer, x, places)
        if rotary is None:
            return q, k, k
        cos, sin = (part[0] for part in rotary)
        a, b = k.chunk(2, -1)
        return q, k, k * cos + torch.cat([-b, a], -1) * sin

    def rotary(self, layer: int, x: Tensor, places: Tensor) -> Any:
        found = getattr(self.text, "rotary_emb", None)
        if found is None:
            return None
        sets = (self.text.layers[layer].self_attn.layer_type,) if hasattr(found, "layer_types") else ()
        return found(x, places, *sets)
