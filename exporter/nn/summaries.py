"""Prefill of a `Summarizing` method: a token of its own behind every few visual tokens, window by window.

The sequence is [visual tokens | summaries | padding | text]. Windows attend one after another, each to no more than it sees, so that
prefill grows with their number and not with its square.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

from exporter.nn.atom import Atom
from exporter.nn.cuts import Trained
from exporter.nn.decoder_layer import Frame, Layer
from exporter.nn.layers import MASKED, rotate
from exporter.nn.specs import DecoderSpec
from graphs._blocks import spread, take
from graphs._contract import Summarizing

PLACED = 6
"""Rotary factors that `Windows` returns: cos and sin for visual tokens and text, for summaries in their window, behind it."""


def spans(counts: Sequence[int]) -> Iterator[slice]:
    """Consecutive slices of these lengths."""
    start = 0
    for count in counts:
        yield slice(start, start + count)
        start += count


class Windows(Atom):
    """What all layers share: the sequence with the summaries, rotary factors, a mask for every window and one for the text."""

    def __init__(self, spec: DecoderSpec, method: Summarizing, trained: Trained) -> None:
        super().__init__()
        self.spec, self.method, self.trained, self.frame = spec, method, trained, Frame(spec)

    def key(self) -> Hashable:
        return self.spec, self.method

    def forward(self, x: Tensor, position_ids: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        """x [batch, visual + text, hidden]; position_ids, order int64 [batch, visual + text].

        Returns x with the summaries; order of what the cache holds, int64 [batch, summaries + text]; the anchors, int64 [batch,
        summaries]; `PLACED` rotary factors [batch, 1, tokens, head_dim / 2]; masks [batch, 1, group * queries, keys], of every window
        (keys: text, summaries before, own visual tokens, own summaries), then of the text (text, all summaries)."""
        m = self.method
        visual, summaries = sum(m.windows), m.kept(0)
        embedding = self.trained.get_parameter(m.embedding).to(x.dtype)
        own = (torch.zeros_like(x[:, :1]) + embedding).expand(-1, summaries, -1)
        x = torch.cat([x[:, :visual], own, x[:, visual:]], 1)

        text = order[:, visual:]
        first = order[:, :visual].amin(1, keepdim=True)
        front = text < first  # text before the image
        start = front.to(torch.int64).sum(1, keepdim=True)
        tokens, inside = self.places()
        behind = position_ids[:, visual:] - torch.where(front, 0, visual - summaries)
        placed = torch.cat([start + torch.tensor(tokens), behind], 1)
        rotary = [
            *self.frame.rotary(placed, x.dtype),
            *self.frame.rotary(start + torch.tensor(inside), x.dtype),
            *self.frame.rotary(start + torch.arange(summaries), x.dtype),
        ]
        anchors = spread(m.anchors, order).long()
        kept = torch.cat([take(order[:, :visual], anchors), text], 1)

        masks, before = [], 0
        for count, more in zip(m.windows, m.summaries, strict=True):
            within = [n + n // m.every for n in range(count)] + [(n + 1) * (m.every + 1) - 1 for n in range(more)]
            place = torch.tensor(within)
            seen = front[:, None, :].expand(-1, count + more, -1)
            always = torch.ones_like(seen[:, :, :1])
            parts = [seen, *([always.expand(-1, -1, before)] if before else []), always & (place <= place[:, None])]
            masks.append(self.mask(torch.cat(parts, 2), x.dtype))
            before += more
        seen = text[:, None, :] <= text[:, :, None]
        past = (~front)[:, :, None].expand(-1, -1, summaries)
        masks.append(self.mask(torch.cat([seen, past], 2), x.dtype))
        return (x, kept, anchors, *rotary, *masks)

    def places(self) -> tuple[list[int], list[int]]:
        """Positions behind the text in front: of the visual tokens, and of the summaries in their windows."""
        m, tokens, inside, before = self.method, [], [], 0
        for count, more in zip(m.windows, m.summaries, strict=True):
            tokens += [before + n + n // m.every for n in range(count)]
            inside += [before + (n + 1) * (m.every + 1) - 1 for n in range(more)]
            before += more
        return tokens, inside

    def mask(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """bool [batch, queries, keys] → [batch, 1, group * queries, keys], added to scores."""
        bias = torch.where(seen, 0.0, MASKED).to(dtype)[:, None]
        return torch.cat([bias] * (self.spec.heads // self.spec.kv_heads), 2)


class Summarized(Atom):
    """One decoder layer of that prefill. The parameters are the layer's, but for the projections of the summaries."""

    def __init__(self, layer: Layer, method: Summarizing, projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layer, self.method = layer, method
        self.of_summaries = nn.ModuleList(projections)

    def key(self) -> Hashable:
        return self.layer.self_attn.spec, self.method

    def forward(self, x: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        """shared: what `Windows` returns behind the anchors. Returns x, and the keys and values that stay."""
        rotary, masks = shared[:PLACED], shared[PLACED:]
        m, a = self.method, self.layer.self_attn
        visual, summaries = sum(m.windows), m.kept(0)
        normed = self.layer.input_layernorm(x)
        q, k, v = a.plain(torch.cat([normed[:, :visual], normed[:, visual + summaries :]], 1))
        q, k = (rotate(t, *rotary[:2]) for t in (q, k))
        own_q, own_k, own_v = a.by_head(*self.project(normed[:, visual : visual + summaries]))
        own_q, inside, behind = (rotate(own_q, *rotary[2:4]), rotate(own_k, *rotary[2:4]), rotate(own_k, *rotary[4:]))
        text_k, text_v = k[:, :, visual:], v[:, :, visual:]

        read, summed = [], []
        for tokens, own, mask in zip(spans(m.windows), spans(m.summaries), masks, strict=False):
            past = slice(own.start)
            keys = [text_k, *([behind[:, :, past]] if own.start else []), k[:, :, tokens], inside[:, :, own]]
            values = [text_v, *([own_v[:, :, past]] if own.start else []), v[:, :, tokens], own_v[:, :, own]]
            queries = torch.cat([q[:, :, tokens], own_q[:, :, own]], 2)
            out = a.read(queries, torch.cat(keys, 2), torch.cat(values, 2), mask)
            count = tokens.stop - tokens.start
            read.append(out[:, :count])
            summed.append(out[:, count:])
        stays = torch.cat([text_k, behind], 2), torch.cat([text_v, own_v], 2)
        text = a.read(q[:, :, visual:], *stays, masks[-1])
        x, _ = self.layer.behind(x, a.o_proj(torch.cat([*read, *summed, text], 1)))
        return x, torch.cat([behind, text_k], 2), torch.cat([own_v, text_v], 2)

    def project(self, x: Tensor) -> Iterator[Tensor]:
        """Queries, keys and values of the summaries [batch, summaries, hidden], heads side by side."""
        for linear in self.of_summaries:
            parameters = dict(linear.named_parameters())
            out = x @ parameters["weight"].t()
            yield out + parameters["bias"] if "bias" in parameters else out
