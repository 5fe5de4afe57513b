"""What reductions inside the language model and in its cache are shown; the signals of `graphs._contract`, each computed
when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exporter.graphset import PAD
from exporter.nn.layers import soft_cap
from exporter.nn.specs import DecoderSpec


def scores(spec: DecoderSpec, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """What goes into the softmax: [.., queries, keys], float32 where scores are capped; query, key [.., tokens, head_dim]."""
    found = soft_cap((query * spec.attention_scale) @ key.transpose(-1, -2), spec.attention_cap)
    return found if bias is None else found + bias.to(found.dtype)


class Attended:
    """What one layer attended with.

    Args:
        visual: visual tokens in front. query [batch, heads, seq, head_dim] and key [batch, kv_heads, seq, head_dim], with
            RoPE. bias: the layer's mask [batch, 1, group * seq, seq]. order: int64 [batch, seq].
    """

    def __init__(self, spec: DecoderSpec, visual: int, query: Tensor, key: Tensor, bias: Tensor, order: Tensor) -> None:
        self.spec, self.v, self.q, self.k, self.bias, self.order = spec, visual, query, key, bias, order

    def text_mask(self) -> Tensor:
        return (self.order[:, self.v :] < PAD).to(torch.float32)

    def instruction_mask(self) -> Tensor:
        behind = self.order[:, self.v :] > self.order[:, : self.v].amax(1, keepdim=True)
        return behind.to(torch.float32) * self.text_mask()

    def keys(self) -> Tensor:
        return self.k[:, :, : self.v]

    def attention_row(self) -> Tensor:
        return self.last()[:, : self.v]

    def last(self) -> Tensor:
        """The last token's attention to everything float32 [batch, keys], mean over heads."""
        return self.rows(self.q[:, :, -1:], self.k, self.bias[:, :, -1:]).mean((1, 2))[:, 0]

    def last_scores(self) -> Tensor:
        return self.scores(self.q[:, :, -1:], self.keys(), None).flatten(1, 3)

    def last_log_attention(self) -> Tensor:
        found = self.scores(self.q[:, :, -1:], self.k, self.bias[:, :, -1:]).flatten(1, 3)
        return torch.log_softmax(found, -1)[..., : self.v]

    def text_attention(self) -> Tensor:
        return self.of_text().mean((1, 2))[..., : self.v]

    def of_text(self) -> Tensor:
        """Attention of the text float32 [batch, kv_heads, group, text, seq]."""
        return self.whole_rows(self.q, self.k, slice(self.v, None))

    def whole_rows(self, query: Tensor, key: Tensor, tokens: slice) -> Tensor:
        """Attention of some of the layer's tokens to all, by its mask: float32 [batch, kv_heads, group, tokens, seq]."""
        seq = self.order.shape[1]
        bias = self.bias[:, :, :seq][:, :, tokens]  # the mask is the same for every query head
        return self.rows(query[:, :, tokens], key, bias)

    def rows(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """Attention float32 [batch, kv_heads, group, queries, keys]; bias [batch, 1, queries, keys]."""
        return torch.softmax(self.scores(query, key, bias), -1)

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """What goes into that softmax, float32."""
        heads, kv_heads = query.shape[1], key.shape[1]
        grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
        return scores(self.spec, grouped, key.unsqueeze(2), None if bias is None else bias.unsqueeze(1)).float()


class InCacheSeen(Attended):
    """The signals of a reduction of the cache, behind its layer."""

    def head_attention(self) -> Tensor:
        return self.of_text().mean(2)[..., : self.v]

    def received(self) -> Tensor:
        seq = self.order.shape[1]
        real = (self.order < PAD).to(torch.float32)[:, None, None, None]
        found: Tensor = (real @ self.rows(self.q, self.k, self.bias[:, :, :seq]))[..., 0, : self.v]
        return found.mean(2)

    def behind(self) -> Tensor:
        text = self.order[:, self.v :]
        return torch.where(text < PAD, text[:, -1:] - text, -1)


class InLLMSeen(Attended):
    """The signals of a reduction before a layer, given everything of the layer before.

    Args:
        x [batch, seq, hidden]: what enters the layer; previous: what entered the one before; embeds: the first.
        whole: [batch, entered, hidden], the visual tokens of the first before any was dropped; places: which of them are left.
        size: float32 [batch, seq]. plain_query, plain_key: without RoPE. cos, sin: of that layer's RoPE [batch, 1, seq, head_dim / 2],
            None where nothing is turned. ahead: what the layer itself would attend with, rotated queries and keys, plain ones,
            and its mask.
    """

    def __init__(
        self, spec: DecoderSpec, visual: int, x: Tensor, previous: Tensor, embeds: Tensor | None, whole: Tensor | None,
        places: Tensor | None, order: Tensor, size: Tensor | None, bias: Tensor, query: Tensor, key: Tensor, plain_query: Tensor, plain_key: Tensor,
        cos: Tensor | None, sin: Tensor | None, ahead: Sequence[Tensor],
    ) -> None:  # fmt: skip
        super().__init__(spec, visual, query, key, bias, order)
        self.x, self.before, self.first, self.whole, self.sizes = x, previous, embeds, whole, size
        self.entered = places
        self.plain_q, self.plain_k, self.cos, self.sin, self.ahead = plain_query, plain_key, cos, sin, ahead

    def hidden(self) -> Tensor:
        return self.x[:, : self.v]

    def size(self) -> Tensor:
        return (
            torch.ones_like(self.x[:, : self.v, 0], dtype=torch.float32)
            if self.sizes is None
            else self.sizes[:, : self.v]
        )

    def previous(self) -> Tensor:
        return self.before[:, : self.v]

    def embeds(self) -> Tensor:
        assert self.first is not None
        return self.first[:, : self.v]

    def all_embeds(self) -> Tensor:
        assert self.whole is not None
        return self.whole

    def places(self) -> Tensor:
        assert self.entered is not None
        return self.entered

    def text_hidden(self) -> Tensor:
        return self.x[:, self.v :]

    def text_embeds(self) -> Tensor:
        assert self.first is not None
        return self.first[:, self.v :]

    def plain_row(self) -> Tensor:
        return self.rows(self.plain_q[:, :, -1:], self.plain_k[:, :, : self.v], None).mean((1, 2))[:, 0]

    def next_row(self) -> Tensor:
        q, k, *_, bias = self.ahead
        return self.rows(q[:, :, -1:], k, bias[:, :, -1:]).mean((1, 2))[:, 0, : self.v]

    def next_plain_row(self) -> Tensor:
        _, _, q, k, bias = self.ahead
        return self.rows(q[:, :, -1:], k, bias[:, :, -1:]).mean((1, 2))[:, 0, : self.v]

    def head_attention(self) -> Tensor:
        return self.of_text().flatten(1, 2)[..., : self.v]

    def visual_attention(self) -> Tensor:
        return self.whole_rows(self.q, self.k, slice(self.v)).mean((1, 2))[..., : self.v]

    def plain_text_attention(self) -> Tensor:
        return self.plain_of_text().mean((1, 2))[..., : self.v]

    def plain_head_attention(self) -> Tensor:
        return self.plain_of_text().flatten(1, 2)[..., : self.v]

    def plain_of_text(self) -> Tensor:
        return self.whole_rows(self.plain_q, self.plain_k, slice(self.v, None))

    def plain_visual_attention(self) -> Tensor:
        return self.whole_rows(self.plain_q, self.plain_k, slice(self.v)).mean((1, 2))[..., : self.v]

    def rope_response(self) -> Tensor:
        text, visual = self.x[:, self.v :, :1].float(), self.x[:, : self.v, :1].float()
        if self.cos is None or self.sin is None:
            return 0 * text @ visual.transpose(1, 2) + 1
        both = torch.cat([self.cos, self.sin], -1)[:, 0].float()
        both = both / both.pow(2).sum(-1, keepdim=True).sqrt()
        return both[:, self.v :] @ both[:, : self.v].transpose(1, 2)

    def next_keys(self) -> Tensor:
        return self.ahead[1][:, :, : self.v]

    def next_plain_queries(self) -> Tensor:
        return self.ahead[2][:, :, : self.v]

    def next_plain_keys(self) -> Tensor:
        return self.ahead[3][:, :, : self.v]
