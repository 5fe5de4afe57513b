"""A Llama-type decoder (Llama, Mistral, Qwen2, Qwen3, Gemma, OPT, M-RoPE; what differs is in `DecoderSpec`) that prunes visual
tokens between layers and keeps one KV length per group of layers. `exporter.graphset` describes the inputs: visual tokens
first, `order` carries causality."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from exporter.kv import Inside
from exporter.nn.atom import Atom
from exporter.nn.cache import Int8, opened
from exporter.nn.cuts import (
    Ahead,
    Cut,
    Enter,
    Evict,
    Follow,
    Leave,
    Nudge,
    Probe,
    Rejoin,
    Route,
    Stay,
    Trained,
    Watch,
    Withdraw,
)  # fmt: skip
from exporter.nn.decoder_layer import Frame, Layer
from exporter.nn.layers import LayerNorm, Linear, RMSNorm, soft_cap
from exporter.nn.specs import DecoderSpec
from exporter.nn.summaries import Summarized, Windows
from graphs._contract import Probing, Skipping, Summarizing, WhileDecoding

A = TypeVar("A", bound=Atom)


class Planes(Atom):
    """Takes what is added later off the tokens: [batch, seq, hidden * (1 + planes)] → each [batch, seq, hidden]."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def key(self) -> Hashable:
        return self.count

    def forward(self, inputs_embeds: Tensor) -> tuple[Tensor, ...]:
        return inputs_embeds.chunk(1 + self.count, -1)


class Add(Atom):
    """A plane to what leaves a layer."""

    def key(self) -> Hashable:
        return None

    def forward(self, x: Tensor, plane: Tensor) -> Tensor:
        return x + plane


class Positions(Atom):
    """Learned positions, added to the tokens [batch, seq, hidden]; position_ids int64 [batch, seq]."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.positions, spec.hidden), requires_grad=False)
        self.first = spec.first_position

    def key(self) -> Hashable:
        return *self.weight.shape, self.first

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return x + self.weight[position_ids + self.first]


class _Last(Atom):
    """The norm behind the last layer, of the last token: [batch, seq, hidden] → [batch, hidden]."""

    eps: float

    def key(self) -> Hashable:
        return self.eps

    def every(self, x: Tensor) -> Tensor:
        """Of every token."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.every(x[:, -1])


class FinalNorm(_Last, RMSNorm): ...


class FinalLayerNorm(_Last, LayerNorm): ...


class LmHead(Atom, Linear):
    """[batch, hidden] → logits [batch, vocab]."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(spec.hidden, spec.vocab, bias=False)
        self.cap = spec.logit_cap

    def key(self) -> Hashable:
        return *self.weight.shape, self.cap

    def forward(self, x: Tensor) -> Tensor:
        return soft_cap(Linear.forward(self, x), self.cap).to(x.dtype)


class Decoder(nn.Module):
    """Decoder layers, final norm and LM head.

    Args:
        inside: the reductions inside it, which cut the layers into KV groups, and of its cache.
        prunes: whether visual tokens stand in front and are pruned at the cuts (prefill), or have been (decode).
    """

    def __init__(self, spec: DecoderSpec, inside: Inside | None = None, prunes: bool = False) -> None:
        super().__init__()
        inside = inside or Inside()
        visual, reductions = inside.visual, inside.in_llm
        self.spec = spec
        if spec.planes:
            self.planes, self.add = Planes(spec.planes), Add()
        if spec.positions:
            self.embed_positions = Positions(spec)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm: FinalNorm | FinalLayerNorm = (
            FinalLayerNorm(spec.hidden, spec.eps)
            if spec.layer_norms
            else FinalNorm(spec.hidden, spec.eps, spec.norm_offset)
        )
        self.lm_head = LmHead(spec)
        self.layout = inside.layout(spec.layers)
        self.int8: Int8 | None = None
        self.pruned: dict[int, Cut] = {}
        self.ahead: dict[int, Ahead] = {}
        self.evicted: dict[int, Evict | Follow] = {}
        first = {"embeds", "all_embeds", "text_embeds"}
        self.looks_back = prunes and any(first & set(method.needs) for _, method in reductions)
        self.watch: dict[int, Watch] = {}
        self.routed: dict[int, Route] = {}
        self.probe: Probe | None = None
        self.leaves, self.since = dict[int, Leave](), 0
        asked = prunes and any("places" in method.needs for _, method in reductions)
        self.enter = Enter(visual) if asked else None
        self.of_tower = tuple(name for _, method in reductions for name in method.of_tower) if prunes else ()
        present, shift = visual, 0
        shifts = {0: 0}  # how far positions have moved up, from a layer on
        for name, method in reductions:
            known = Trained(inside.trained.get(name, {}))
            self.add_module(f"{name}_trained", known)
            if isinstance(method, Probing) and prunes:
                self.probe, self.nudge, self.withdraw = Probe(spec, method, known), Nudge(), Withdraw()
            if isinstance(method, WhileDecoding):
                (layer,) = method.layers
                self.watch[layer - 1] = Watch(spec, method, present, prunes, known)
                self.add_module(f"{name}_watch", self.watch[layer - 1])
            if isinstance(method, Skipping):
                for layer in method.layers if prunes else ():
                    self.routed[layer] = self._named(name, (), layer, Route(layer, method, present, known))
                    self.add_module(f"rejoin_{layer}", Rejoin(present))
                    self.add_module(f"stay_{layer}", Stay(present))
                continue
            for layer in method.layers:
                cut = Cut(spec, layer, method, present, visual, method.position == "compact", known)
                if method.everywhere and prunes:
                    leave, self.since = Leave(present, self.probe is not None), method.since
                    self.leaves[layer] = self._named("leave", method.layers, layer, leave)
                shift += present - method.kept(layer) if cut.compact else 0
                present, shifts[layer] = method.kept(layer), shift
                if prunes:
                    self.pruned[layer] = self._named(name, method.layers, layer, cut)
                    if layer < spec.planes or spec.reach:
                        self.add_module(f"stay_{layer}", Stay(cut.visual))
                    if cut.looks_ahead:
                        self.ahead[layer] = Ahead(self.layers[layer])  # type: ignore[arg-type]
                        self.add_module(f"ahead_{layer}", self.ahead[layer])
        self.windows: Windows | None = None
        self.summarized: list[Summarized] = []
        for name, evict in inside.in_cache:
            behind = range(evict.start, spec.layers)
            if isinstance(evict, Summarizing):
                known = Trained(inside.trained.get(name, {}))
                self.add_module(f"{name}_trained", known)
                shifts[0] = present - evict.kept(0)
            if not prunes:
                continue
            if isinstance(evict, Summarizing):
                self.windows = Windows(spec, evict, known)
                self.add_module(f"{name}_windows", self.windows)
                for layer in behind:
                    own = [known.get_submodule(path) for path in evict.projections(layer)]
                    atom = Summarized(self.layers[layer], evict, own)  # type: ignore[arg-type]
                    self.summarized.append(self._named(name, behind, layer, atom))
                continue
            for layer in behind:
                chooses = layer == evict.start or not evict.shared
                what = Evict(spec, layer, evict, present) if chooses else Follow(evict, present)
                self.evicted[layer] = self._named(name, behind, layer, what)
        self.frames: dict[int, Frame] = {}
        moved = [shifts[max(first for first in shifts if first <= layer)] for layer in range(spec.layers)]
        for layer in range(1 if prunes else spec.layers):
            # Prefill has its frame anew behind every cut; in decode what was cut is gone, and positions are the prompt's.
            if layer and not self.layout.first(layer) and moved[layer] == moved[layer - 1]:
                continue
            readers = sum(len(method.readers) for _, method in inside.in_cache) if prunes else 0
            frame = Frame(spec, moved[layer], (visual, readers))
            self.add_module(f"frame_{len(self.frames)}" if self.frames else "frame", frame)
            self.frames[layer] = frame

    def _named(self, name: str, layers: Sequence[int], layer: int, atom: A) -> A:
        self.add_module(name if len(layers) == 1 else f"{name}_{layer}", atom)
        return atom

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        order: Tensor,
        past_keys: Sequence[Tensor] = (),
        past_values: Sequence[Tensor] = (),
        past_orders: Sequence[Tensor] = (),
        size: Tensor | None = None,
        past_sizes: Sequence[Tensor] = (),
        past_starts: Tensor | None = None,
        past_state: Tensor | None = None,
        of_tower: Sequence[Tensor] = (),
        reach: Tensor | None = None,
        past_scales: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """Run prefill or a decode step.

        Args:
            inputs_embeds: [batch, seq, width of the spec], visual tokens first. position_ids: int64 [batch, seq] or [3, batch, seq].
            order: int64 [batch, seq]. past_keys, past_values: per layer [batch, kv_heads, past, head_dim].
            past_orders: int64, per KV group [batch, past], or [batch, kv_heads, past] where heads keep their own.
            size: float32 [batch, seq], how many tokens each one stands for; attention counts them. past_sizes: as orders.
            reach: int64 [batch, seq], order of the last token that each one sees; None: its own.
            past_starts, past_state: what `Watch` returned before, where a method goes on while decoding.
            of_tower: the tower's signals that the reductions need, [batch, frames, tokens] or [batch, frames, tokens, dim].
            past_scales: per KV group [batch, rows, past, 1], where the cache is INT8 (`cache.Int8`).
        Returns:
            logits [batch, vocab] of the last token, present key and value per layer (alternating), the scales per group if
            they are INT8, present order per group, present size per group if there are sizes, and for every layer that chooses the kept index int64
            [batch, kept] into its visual tokens; then the same for its cache, there also [batch, kv_heads, kept];
            then what `Watch` returns.
        """
        if self.windows is not None:
            return self.summarize(self.windows, inputs_embeds, position_ids, order)
        x, *planes = self.planes(inputs_embeds) if self.spec.planes else (inputs_embeds,)
        groups = self.layout.groups
        cache = opened(self.int8, past_keys, past_values, past_scales)
        orders: dict[int, Tensor] = {}
        sizes: dict[int, Tensor] = {}
        kept: list[Tensor] = []
        cached: list[Tensor] = []
        watched: tuple[Tensor, ...] = ()
        positions = position_ids
        nudges: list[Tensor] = []
        if self.probe is not None:
            x, positions, order, *nudges = self.probe(x, positions, order)
        if self.spec.positions:
            x = self.embed_positions(x, positions)
        embeds = x if self.looks_back else None
        whole = embeds
        places = None if self.enter is None else self.enter(order)
        frame = self.frames[0]
        shared: list[Tensor] = []
        before: tuple[Any, ...] = ()  # of the layer before: what entered it, its mask, queries, keys and rotation
        for i, layer in enumerate(self.layers):
            group = groups[i]
            if i and nudges:
                x = self.nudge(x, nudges.pop(0))
            if 0 < i <= len(planes):
                x = self.add(x, planes[i - 1])
            if i in self.pruned:
                assert before, "nothing has looked at the tokens before the first layer"
                previous, *seen = before
                ahead: tuple[Tensor, ...] = ()
                if i in self.ahead:
                    cos, sin, bias = frame.of_layer(i, shared)
                    ahead = (*self.ahead[i](x, cos, sin), bias)
                x, positions, order, *more, index = self.pruned[i](
                    x, previous, embeds, whole, places, positions, order, size, *seen, *of_tower, *ahead
                )
                size = more.pop(0) if size is not None else None
                embeds = more.pop(0) if embeds is not None else None
                places = more.pop(0) if places is not None else None
                kept.append(index)
                if self.probe is not None:
                    x, positions, order = self.withdraw(x, positions, order)
                if i in self.leaves:
                    for of in cache.kept:
                        earlier = zip(of[2 * self.since :: 2], of[2 * self.since + 1 :: 2], strict=True)
                        of[2 * self.since :] = [left for pair in earlier for left in self.leaves[i](*pair, index)]
                planes[i:] = [self.get_submodule(f"stay_{i}")(plane, index) for plane in planes[i:]]
                if reach is not None:
                    reach = self.get_submodule(f"stay_{i}")(reach, index)
            if i in self.frames or i in self.pruned:
                frame = self.frames.get(i, frame)
                past_order = past_orders[group] if past_orders else None
                past_size = past_sizes[group] if past_sizes else None
                orders[group], *shared = frame(x, positions, order, past_order, size, past_size, reach)
                if size is not None:
                    sizes[group] = shared.pop(0)
            past = cache.past(i)
            if i in self.routed:
                some, places, orders[group], index, weight = self.routed[i](x, positions, order)
                far = None if reach is None else self.get_submodule(f"stay_{i}")(reach, index)
                _, *narrow = frame(some, places, orders[group], None, None, None, far)
                some, key, value, *_, attended = layer(some, *frame.of_layer(i, narrow), *past)
                x = self.get_submodule(f"rejoin_{i}")(x, some, attended, index, weight)
                cache.keep(i, key, value)
                cached.append(index)
                continue
            cos, sin, bias = frame.of_layer(i, shared)
            entered = x
            x, key, value, query, plain_query, plain_key, _ = layer(x, cos, sin, bias, *past)
            before = entered, bias, query, key, plain_query, plain_key, cos, sin
            if i in self.watch:
                watched = self.watch[i](query, key, bias, orders[group], past_starts, past_state)
            evict = self.evicted.get(i)
            if isinstance(evict, Evict):
                key, value, orders[group], *more, index = evict(query, key, value, bias, order, size)
                if size is not None:
                    (sizes[group],) = more
                cached.append(index)
            elif evict is not None:
                key, value = evict(key, value, index)
            elif group not in orders:  # behind layers whose cache is shortened
                orders[group] = order
                if size is not None:
                    sizes[group] = size
            cache.keep(i, key, value)
        tokens = [*orders.values(), *sizes.values()]
        return (self.lm_head(self.norm(x)), *cache.present(), *tokens, *kept, *cached, *watched)

    def summarize(self, windows: Windows, x: Tensor, positions: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        """Prefill of a `Summarizing` method: logits, presents, order of the one KV group, and for the kept index the anchors."""
        x, kept, anchors, *shared = windows(x, positions, order)
        cache = opened(self.int8, [], [], [])
        for i, layer in enumerate(self.summarized):
            x, key, value = layer(x, *shared)
            cache.keep(i, key, value)
        return (self.lm_head(self.norm(x)), *cache.present(), kept, anchors)

    @property
    def kept(self) -> list[str]:
        """Names of the kept indices, in order: of layer 2, "kept_2" or, where it is the cache's, "cached_2"."""
        if self.windows is not None:
            return ["cached_0"]
        choosing = [*self.routed, *(i for i, atom in self.evicted.items() if isinstance(atom, Evict))]
        return [*(f"kept_{i}" for i in self.pruned), *(f"cached_{i}" for i in choosing)]
