"""Where a decoder drops visual tokens: before a layer (`Cut`; `Probe`, `Nudge` and `Withdraw` where a probe looks for it), for a
layer (`Route`, `Rejoin`), from a layer's cache (`Evict`, `Follow`), and from the cache again while decoding (`Watch`,
`Shorten`)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from exporter.graphset import PAD
from exporter.nn.atom import Atom
from exporter.nn.decoder_layer import Layer
from exporter.nn.layers import add_parameters, rotate
from exporter.nn.seen import Attended, InCacheSeen, InLLMSeen
from exporter.nn.specs import DecoderSpec
from graphs._blocks import complement, one_hot, take
from graphs._contract import InCache, InLLM, Probing, Skipping, WhileDecoding, take_per_head


class Ahead(Atom):
    """What a layer would attend with: its own norm and projections, before it runs. The parameters are the layer's."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn

    def key(self) -> Hashable:
        return self.self_attn.spec

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, ...]:
        """Queries and keys with the rotation, then before it, as `Attention` makes them."""
        q, k, _ = self.self_attn.plain(self.input_layernorm(x))
        return rotate(q, cos, sin), rotate(k, cos, sin), q, k


class Trained(nn.Module):
    """A method's own trained tensors, as float32."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        add_parameters(self, shapes)

    def forward(self) -> dict[str, Tensor]:
        return {name: self.get_parameter(name).float() for name in self.shapes}


class Enter(Atom):
    """Places of the visual tokens that enter the first layer, among themselves: int64 [batch, visual]."""

    def __init__(self, visual: int) -> None:
        super().__init__()
        self.visual = visual

    def key(self) -> Hashable:
        return self.visual

    def forward(self, order: Tensor) -> Tensor:
        return torch.zeros_like(order[:, : self.visual]) + torch.arange(self.visual)


class Cut(Atom):
    """A reduction before one layer: its signals, and what stays of everything there is per token.

    Args:
        visual: visual tokens present. entered: those that entered the first layer. compact: whether later layers renumber
            positions.
    """

    def __init__(
        self, spec: DecoderSpec, layer: int, method: InLLM, visual: int, entered: int, compact: bool, trained: Trained
    ) -> None:
        super().__init__()
        self.spec, self.layer, self.method, self.compact, self.trained = spec, layer, method, compact, trained
        self.visual, self.entered = visual, entered

    def key(self) -> Hashable:
        return self.spec, self.layer, self.method, self.visual, self.entered, self.compact

    @property
    def looks_ahead(self) -> bool:
        return any(name.startswith("next_") for name in self.method.needs)

    def forward(
        self,
        x: Tensor,
        previous: Tensor,
        embeds: Tensor | None,
        whole: Tensor | None,
        places: Tensor | None,
        position_ids: Tensor,
        order: Tensor,
        size: Tensor | None,
        bias: Tensor,
        query: Tensor,
        key: Tensor,
        plain_query: Tensor,
        plain_key: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        *more: Tensor,
    ) -> tuple[Tensor, ...]:
        """Everything of layer l - 1 but x, which enters layer l; embeds: x of layer 0, its visual tokens gathered like all
        others, and whole: nothing of it gone, or None if nothing looks at it. places: int64 [batch, visual], what `Enter` returned,
        gathered like all others, or None likewise. more: the tower's signals of all tokens that entered, [batch, frames, tokens] or
        [batch, frames, tokens, dim], in the order in which the method needs them; what `Ahead` returns, then the mask of layer l.

        Returns x, position_ids, order, then size, embeds and places if given, all without the dropped tokens, and the kept index
        int64 [batch, kept]."""
        tower = dict(zip(self.method.of_tower, more, strict=False))
        ahead = more[len(tower) :]
        whole = None if whole is None else whole[:, : self.entered]
        seen = InLLMSeen(
            self.spec, self.visual, x, previous, embeds, whole, places, order, size, bias, query, key, plain_query, plain_key, cos, sin,
            ahead,
        )  # fmt: skip
        signals = {
            name: getattr(seen, name)() for name in sorted({"hidden", "size", *self.method.needs} - tower.keys())
        }
        out = self.method.forward(self.layer, signals | tower | self.trained())
        index = out.index
        if self.compact:
            position_ids = position_ids - self.gaps(index, order)
        position_ids = prune_positions(position_ids, self.visual, index)
        sizes = []
        if size is not None:
            kept = take(size[:, : self.visual], index) if out.size is None else out.size
            sizes = [torch.cat([kept, size[:, self.visual :]], 1)]
        x = torch.cat([out.tokens, x[:, self.visual :]], 1)
        first = [] if embeds is None else [prune(embeds, self.visual, index)]
        first += [] if places is None else [take(places, index)]
        return (x, position_ids, prune(order, self.visual, index), *sizes, *first, index)

    def gaps(self, index: Tensor, order: Tensor) -> Tensor:
        """int64 [batch, seq]: how many dropped tokens stand before each token in the prompt."""
        if index.shape[1] == self.visual:  # ONNX Runtime's ReduceSum over an empty axis has the wrong shape
            return torch.zeros_like(order)
        gone = take(order[:, : self.visual], complement(index, self.visual))
        return (gone[:, None, :] < order[:, :, None]).to(torch.int64).sum(-1)


def prune(x: Tensor, visual: int, index: Tensor) -> Tensor:
    """x [batch, seq, ...]: `index` of the visual tokens in front, and all that follow."""
    return torch.cat([take(x[:, :visual], index), x[:, visual:]], 1)


def prune_cache(x: Tensor, visual: int, index: Tensor) -> Tensor:
    """The same of keys or values [batch, kv_heads, seq, head_dim]."""
    each = index[:, None].expand(-1, x.shape[1], -1)
    return torch.cat([take_per_head(x[:, :, :visual], each), x[:, :, visual:]], 2)


class Stay(Atom):
    """What a cut leaves of a tensor that nothing else looks at."""

    def __init__(self, visual: int) -> None:
        super().__init__()
        self.visual = visual

    def key(self) -> Hashable:
        return self.visual

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """x [batch, seq, ...] → the kept visual tokens, and all that follow."""
        return prune(x, self.visual, index)


def prune_positions(position_ids: Tensor, visual: int, index: Tensor) -> Tensor:
    """The same of position ids [batch, seq] or [3, batch, seq]."""
    if position_ids.ndim == 2:
        return prune(position_ids, visual, index)
    return torch.stack([prune(axis, visual, index) for axis in position_ids.unbind(0)])


class Probe(Atom):
    """A method's own token, one place behind the prompt on every axis."""

    def __init__(self, spec: DecoderSpec, method: Probing, trained: Trained) -> None:
        super().__init__()
        self.spec, self.method, self.trained = spec, method, trained

    def key(self) -> Hashable:
        return self.spec, self.method

    def forward(self, x: Tensor, position_ids: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        """Returns x, position_ids and order with the probe behind them, then for `Nudge` [1, 1, hidden] per further layer."""
        first, *rows = self.method.probe(self.trained(), self.spec.eps).to(x.dtype)[:, None, None].unbind(0)
        x = torch.cat([x, first.expand(x.shape[0], -1, -1)], 1)
        position_ids, order = (torch.cat([t, t[..., -1:] + 1], -1) for t in (position_ids, order))
        return (x, position_ids, order, *rows)


class Nudge(Atom):
    """What is added to the probe before a layer. It is the last token."""

    def key(self) -> Hashable:
        return ()

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], x[:, -1:] + row], 1)


class Withdraw(Atom):
    """Everything without the probe."""

    def key(self) -> Hashable:
        return ()

    def forward(self, x: Tensor, position_ids: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        return x[:, :-1], position_ids[..., :-1], order[:, :-1]


class Leave(Atom):
    """Key and value of a layer before that of a method that drops tokens `everywhere`, without them and without its probe."""

    def __init__(self, visual: int, probed: bool) -> None:
        super().__init__()
        self.visual, self.probed = visual, probed

    def key(self) -> Hashable:
        return self.visual, self.probed

    def forward(self, key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        """key, value [batch, kv_heads, visual + text (+ 1), head_dim]; index int64 [batch, kept]."""
        both = (x[:, :, :-1] if self.probed else x for x in (key, value))
        return tuple(prune_cache(x, self.visual, index) for x in both)


class Route(Atom):
    """Which visual tokens take part in one layer."""

    def __init__(self, layer: int, method: Skipping, visual: int, trained: Trained) -> None:
        super().__init__()
        self.layer, self.method, self.visual, self.trained = layer, method, visual, trained

    def key(self) -> Hashable:
        return self.layer, self.method, self.visual

    def forward(self, x: Tensor, position_ids: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        """x, position_ids and order of the tokens that take part, the visual ones in front; their index int64 [batch, kept],
        and the weight float32 [batch, visual] of all visual tokens."""
        signals = {"hidden": x[:, : self.visual], **self.trained()}
        tokens, index, _ = self.method.forward(self.layer, signals)
        x = torch.cat([tokens, x[:, self.visual :]], 1)
        places = prune_positions(position_ids, self.visual, index), prune(order, self.visual, index)
        return (x, *places, index, self.method.weight(self.layer, signals))


class Rejoin(Atom):
    """All tokens again, behind a layer in which some took part."""

    def __init__(self, visual: int) -> None:
        super().__init__()
        self.visual = visual

    def key(self) -> Hashable:
        return self.visual

    def forward(self, x: Tensor, out: Tensor, attended: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """x [batch, seq, hidden] as it was before; out, attended [batch, kept + text, hidden]: behind the layer, behind its
        attention."""
        kept = index.shape[1]
        h, mlp = attended[:, :kept].float(), (out - attended)[:, :kept].float()
        took = h + take(weight, index).unsqueeze(-1) * mlp
        back = one_hot(index, self.visual, torch.float32).transpose(1, 2)  # [batch, visual, kept]
        skipped = (1 - back.sum(-1)) * weight
        visual = back @ took + skipped.unsqueeze(-1) * x[:, : self.visual].float()
        return torch.cat([visual.to(x.dtype), out[:, kept:]], 1)


def group_shares(rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """How much of its attention a token pays to system text, image, instruction and answer: float32 [batch, queries, 4].

    Args:
        rows: float32 [batch, queries, total], 0 in padding. order: int64 [batch, total], of the keys. starts: int64
            [batch, 3], order of the first token of image, instruction and answer.
    """
    part = (order[:, None, :] >= starts[:, :, None]).to(torch.int64).sum(1)  # 0 to 3
    return rows @ (part[:, :, None] == torch.arange(4)).to(torch.float32)


class Watch(Atom):
    """What a method that goes on while decoding looks at, in the layer before its own. In prefill (`visual`: tokens in
    front) it finds out where the parts of the prompt begin; then it is told."""

    def __init__(self, spec: DecoderSpec, method: WhileDecoding, visual: int, prefill: bool, trained: Trained) -> None:
        super().__init__()
        self.spec, self.method, self.visual, self.prefill, self.trained = spec, method, visual, prefill, trained

    def key(self) -> Hashable:
        return self.spec, self.method, self.visual, self.prefill

    @property
    def outputs(self) -> list[str]:
        """Names of what `forward` returns."""
        wanted = ["wanted"] if self.method.predicts else []
        return ["attention_row", "shares", "present_starts", *wanted, *(["present_state"] if self.method.state else [])]

    def forward(
        self, query: Tensor, key: Tensor, bias: Tensor, order: Tensor, starts: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, ...]:
        """query, key, bias as in `Attended`; order: int64 [batch, total], of the keys; starts: int64 [batch, 3], order of
        the first token of image, instruction and answer.

        Returns attention_row float32 [batch, total], shares float32 [batch, 4], starts; then, if the method predicts,
        wanted int64 [batch] and its state float32 [batch, state]."""
        seen = Attended(self.spec, self.visual, query, key, bias, order)
        row = seen.last()
        if starts is None:
            image = order[:, : self.visual]
            starts = torch.stack([image.amin(1), image.amax(1) + 1, order[:, -1] + 1], 1)
        shares = group_shares(row[:, None], order, starts)[:, 0]
        out = [row, shares, starts]
        if self.method.predicts:
            known = self.trained()
            if self.method.state:
                known["state"] = torch.zeros_like(row[:, :1]).expand(-1, self.method.state) if state is None else state
            wanted, new = self.method.wanted({**known, "shares": shares}, self.visual)
            out += [wanted] if new is None else [wanted, new]
        return tuple(out)


class Shorten(Atom):
    """A further cut of the cache while decoding: the graph of one bucket.

    Args:
        present: visual tokens in the cache of these layers. keep: those that stay.
    """

    def __init__(self, method: WhileDecoding, present: int, keep: int) -> None:
        super().__init__()
        self.method, self.present, self.keep = method, present, keep

    def key(self) -> Hashable:
        return self.method, self.present, self.keep

    def forward(self, attention_row: Tensor, kept: Tensor, order: Tensor, size: Tensor | None, *cache: Tensor) -> Any:
        """attention_row as `Watch` gives it; kept: int64 [batch, present], ascending, the tokens of that row which are still
        in the cache; order, size [batch, total] and keys and values [batch, kv_heads, total, head_dim] of every layer.

        Returns kept, order, size if given, and the cache, all cut."""
        index = self.method.shorten(take(attention_row, kept), self.keep)
        places = [order] if size is None else [order, size]
        cut = [torch.cat([take(x[:, : self.present], index), x[:, self.present :]], 1) for x in places]
        return (take(kept, index), *cut, *(prune_cache(x, self.present, index) for x in cache))


class Evict(Atom):
    """A reduction of the cache behind one layer: what it chooses, and what stays."""

    def __init__(self, spec: DecoderSpec, layer: int, method: InCache, visual: int) -> None:
        super().__init__()
        self.spec, self.layer, self.method, self.visual = spec, layer, method, visual

    def key(self) -> Hashable:
        return self.spec, self.method, self.method.alike(self.layer), self.visual

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, order: Tensor, size: Tensor | None
    ) -> tuple[Tensor, ...]:
        """key, value [batch, kv_heads, seq, head_dim], order and size [batch, seq]. Returns key, value, order, size if
        given, all of what stays, and the kept index as `InCache.choose` gives it."""
        seen = InCacheSeen(self.spec, self.visual, query, key, bias, order)
        index = self.method.choose(self.layer, {name: getattr(seen, name)() for name in self.method.needs})
        key, value = follow(self.method, self.visual, key, value, index)
        places = [order] if size is None else [order, size]
        return (key, value, *(self.place(x, index) for x in places), index)

    def place(self, x: Tensor, index: Tensor) -> Tensor:
        """Order or size of what stays: [batch, seq] → [batch, total], or [batch, kv_heads, total]."""
        visual, text = x[:, : self.visual], x[:, self.visual :]
        if index.ndim == 2:
            return torch.cat([take(visual, index), text], 1)
        heads = index.shape[1]
        kept = take_per_head(visual[:, None].expand(-1, heads, -1), index)
        kept = torch.where(index < 0, PAD, kept) if x.dtype == torch.int64 else kept
        return torch.cat([kept, text[:, None].expand(-1, heads, -1)], 2)


class Follow(Atom):
    """Key and value behind a layer for which an earlier one has chosen."""

    def __init__(self, method: InCache, visual: int) -> None:
        super().__init__()
        self.method, self.visual = method, visual

    def key(self) -> Hashable:
        return self.method, self.visual

    def forward(self, key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return follow(self.method, self.visual, key, value, index)


def follow(method: InCache, visual: int, key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen visual tokens and all text. key, value [batch, kv_heads, seq, head_dim]."""
    each = index if index.ndim == 3 else index[:, None].expand(-1, key.shape[1], -1)
    kept = method.merge(key[:, :, :visual], value[:, :, :visual], each)
    return torch.cat([kept[0], key[:, :, visual:]], 2), torch.cat([kept[1], value[:, :, visual:]], 2)
