"""A Llama-type decoder (Llama, Mistral, Qwen2, Qwen3, Gemma, M-RoPE; what differs is in `DecoderSpec`) that prunes visual
tokens between layers and keeps one KV length per group of layers. `exporter.graphset` describes the inputs: visual tokens
first, `order` carries causality."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from exporter.graphset import PAD
from exporter.nn.atom import Atom
from exporter.nn.layers import ACTIVATIONS, MASKED, Linear, RMSNorm, merge_heads, rotate, soft_cap, split_heads
from exporter.nn.specs import DecoderSpec
from graphs._blocks import complement, take
from graphs._contract import InLLM

T = TypeVar("T")


def scores(spec: DecoderSpec, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """What goes into the softmax: [.., queries, keys], float32 where scores are capped; query, key [.., tokens, head_dim]."""
    found = soft_cap((query * spec.attention_scale) @ key.transpose(-1, -2), spec.attention_cap)
    return found if bias is None else found + bias.to(found.dtype)


class Attention(nn.Module):
    """Grouped-query attention in *fold* form: the queries of a KV head are stacked along the token axis, which is one
    of the two masked forms that TensorRT fuses, and as fast as any on ONNX Runtime."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        kv = spec.kv_heads * spec.head_dim
        self.q_proj = Linear(spec.hidden, spec.heads * spec.head_dim, spec.qkv_bias)
        self.k_proj = Linear(spec.hidden, kv, spec.qkv_bias)
        self.v_proj = Linear(spec.hidden, kv, spec.qkv_bias)
        self.o_proj = Linear(spec.heads * spec.head_dim, spec.hidden, spec.output_bias)
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, spec.eps, spec.norm_offset)
            self.k_norm = RMSNorm(spec.head_dim, spec.eps, spec.norm_offset)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, ...]:
        """x [batch, seq, hidden]; bias [batch, 1, group * seq, total]; past [batch, kv_heads, past, head_dim].

        Returns the output, present key and value, and what a reduction may look at: the rotated queries [batch, heads, seq,
        head_dim], and queries and keys before the rotation."""
        s = self.spec
        plain_q, plain_k = self.plain(x)
        q, k = rotate(plain_q, cos, sin), rotate(plain_k, cos, sin)
        v = split_heads(self.v_proj(x), s.kv_heads)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seq = x.shape[1]
        folded = q.reshape(-1, s.kv_heads, s.heads // s.kv_heads * seq, s.head_dim)
        out = torch.softmax(scores(s, folded, k, bias).float(), -1).to(v.dtype) @ v
        return self.o_proj(merge_heads(out.reshape(-1, s.heads, seq, s.head_dim))), k, v, q, plain_q, plain_k

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [batch, heads, seq, head_dim] and keys [batch, kv_heads, seq, head_dim] before the rotation, normed
        where the decoder norms them."""
        s = self.spec
        q, k = self.q_proj(x).unflatten(-1, (s.heads, -1)), self.k_proj(x).unflatten(-1, (s.kv_heads, -1))
        if s.qk_norm:  # behind the transposition ONNX Runtime would move that through the norm, and not fuse it
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2)


class Mlp(nn.Module):
    """Gated MLP."""

    def __init__(self, hidden: int, intermediate: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias)
        self.up_proj = Linear(hidden, intermediate, bias)
        self.down_proj = Linear(intermediate, hidden, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(Atom):
    """One decoder layer. With `post_norms`, `post_attention_layernorm` is what it is called; without, it is the norm
    before the MLP: the names are the checkpoints'."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        norm = spec.hidden, spec.eps, spec.norm_offset
        self.input_layernorm = RMSNorm(*norm)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(*norm)
        if spec.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(*norm)
            self.post_feedforward_layernorm = RMSNorm(*norm)
        self.mlp = Mlp(spec.hidden, spec.intermediate, spec.activation)

    def key(self) -> Hashable:
        return self.self_attn.spec

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, past_key: Tensor | None, past_value: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Returns x, the present key and value, the rotated queries, and queries and keys before the rotation."""
        past = None if past_key is None or past_value is None else (past_key, past_value)
        out, *rest = self.self_attn(self.input_layernorm(x), cos, sin, bias, past)
        if not self.self_attn.spec.post_norms:
            x = x + out
            return (x + self.mlp(self.post_attention_layernorm(x)), *rest)
        x = x + self.post_attention_layernorm(out)
        return (x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), *rest)


class Frame(Atom):
    """What the layers of a KV group share: order (and size) of all its tokens, rotary factors for each set of frequencies, a
    mask for each sliding window."""

    def __init__(self, spec: DecoderSpec, shift: int = 0) -> None:
        """`shift`: how far the positions of what follows the image have moved up."""
        super().__init__()
        self.spec, self.shift = spec, shift
        self.windows = tuple(dict.fromkeys(spec.windows))
        self.frequencies = tuple(dict.fromkeys(map(spec.frequencies, range(spec.layers))))
        for i, inv_freq in enumerate(self.frequencies):
            values = torch.tensor(inv_freq, dtype=torch.float32, device="cpu")
            self.register_buffer(f"inv_freq_{i}", values, persistent=False)

    def key(self) -> Hashable:
        return self.spec, self.shift

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        order: Tensor,
        past_order: Tensor | None,
        size: Tensor | None,
        past_size: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """order, and size if given, with the past [batch, total]; cos, sin [batch, 1, seq, head_dim / 2] for each set of
        frequencies; masks [batch, 1, group * seq, total], to which log(size) of the keys is added."""
        s = self.spec
        if self.shift:
            position_ids = position_ids - self.shift
        rotary = []
        for i in range(len(self.frequencies)):
            angle = position_ids.float().unsqueeze(-1) * self.get_buffer(f"inv_freq_{i}")
            if s.mrope_section is not None:
                parts = angle.split(list(s.mrope_section), -1)
                angle = torch.cat([part[axis] for axis, part in enumerate(parts)], -1)
            angle = angle.unsqueeze(1)
            cos, sin = torch.cos(angle), torch.sin(angle)
            if s.rope_scale != 1.0:
                cos, sin = cos * s.rope_scale, sin * s.rope_scale
            rotary += [cos.to(x.dtype), sin.to(x.dtype)]
        total = order if past_order is None else torch.cat([past_order, order], 1)
        sizes = [] if size is None else [size if past_size is None else torch.cat([past_size, size], 1)]
        allowed = torch.log(sizes[0])[:, None, None, :] if sizes else torch.zeros(())
        q, kv = order[:, None, :, None], total[:, None, None, :]
        masks = []
        for window in self.windows:
            visible = kv <= q
            if window is not None:
                visible = visible & (kv > q - window)
            bias = torch.where(visible, allowed, MASKED).to(x.dtype)
            masks.append(torch.cat([bias] * (s.heads // s.kv_heads), 2))
        return (total, *sizes, *rotary, *masks)

    def of_layer(self, layer: int, shared: Sequence[T]) -> tuple[T, T, T]:
        """cos, sin and mask of one layer. shared: what `forward` returns behind order and size."""
        pair = 2 * self.frequencies.index(self.spec.frequencies(layer))
        masks = shared[2 * len(self.frequencies) :]
        return shared[pair], shared[pair + 1], masks[self.windows.index(self.spec.windows[layer])]


class Ahead(Atom):
    """What a layer would attend with: its own norm and projections, before it runs. The parameters are the layer's."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn

    def key(self) -> Hashable:
        return self.self_attn.spec

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys with the rotation, then before it, as `Attention` makes them."""
        q, k = self.self_attn.plain(self.input_layernorm(x))
        return rotate(q, cos, sin), rotate(k, cos, sin), q, k


class Cut(Atom):
    """A reduction before one layer: its signals, and what stays of everything there is per token.

    Args:
        visual: visual tokens present. compact: whether later layers renumber positions.
    """

    def __init__(self, spec: DecoderSpec, layer: int, method: InLLM, visual: int, compact: bool) -> None:
        super().__init__()
        self.spec, self.layer, self.method, self.visual, self.compact = spec, layer, method, visual, compact

    def key(self) -> Hashable:
        return self.spec, self.layer, self.method, self.visual, self.compact

    @property
    def looks_ahead(self) -> bool:
        return any(name.startswith("next_") for name in self.method.needs)

    def forward(
        self,
        x: Tensor,
        previous: Tensor,
        embeds: Tensor | None,
        position_ids: Tensor,
        order: Tensor,
        size: Tensor | None,
        bias: Tensor,
        query: Tensor,
        key: Tensor,
        plain_query: Tensor,
        plain_key: Tensor,
        *ahead: Tensor,
    ) -> tuple[Tensor, ...]:
        """Everything of layer l - 1 but x, which enters layer l; `ahead`: from `Ahead`, then the mask of layer l. embeds: x
        of layer 0, its visual tokens gathered like all others, or None if nothing looks at it.

        Returns x, position_ids, order, then size and embeds if given, all without the dropped tokens, and the kept index
        int64 [batch, kept]."""
        seen = _Seen(
            self.spec, self.visual, x, previous, embeds, order, size, bias, query, key, plain_query, plain_key, ahead
        )
        signals = {name: getattr(seen, name)() for name in {"hidden", "size", *self.method.needs}}
        out = self.method.forward(self.layer, signals)
        index = out.index
        if self.compact:
            position_ids = position_ids - self.gaps(index, order)
        if position_ids.ndim == 3:
            position_ids = torch.stack([self.prune(axis, index) for axis in position_ids.unbind(0)])
        else:
            position_ids = self.prune(position_ids, index)
        sizes = []
        if size is not None:
            kept = take(size[:, : self.visual], index) if out.size is None else out.size
            sizes = [torch.cat([kept, size[:, self.visual :]], 1)]
        x = torch.cat([out.tokens, x[:, self.visual :]], 1)
        first = [] if embeds is None else [self.prune(embeds, index)]
        return (x, position_ids, self.prune(order, index), *sizes, *first, index)

    def prune(self, x: Tensor, index: Tensor) -> Tensor:
        """x [batch, seq, ...]: keep `index` of the visual tokens in front and all that follow."""
        return torch.cat([take(x[:, : self.visual], index), x[:, self.visual :]], 1)

    def gaps(self, index: Tensor, order: Tensor) -> Tensor:
        """int64 [batch, seq]: how many dropped tokens stand before each token in the prompt."""
        if index.shape[1] == self.visual:  # ONNX Runtime's ReduceSum over an empty axis has the wrong shape
            return torch.zeros_like(order)
        gone = take(order[:, : self.visual], complement(index, self.visual))
        return (gone[:, None, :] < order[:, :, None]).to(torch.int64).sum(-1)


class _Seen:
    """The signals of a `Cut`, each computed when it is asked for; see `graphs._contract`."""

    def __init__(
        self, spec: DecoderSpec, visual: int, x: Tensor, previous: Tensor, embeds: Tensor | None, order: Tensor,
        size: Tensor | None, bias: Tensor, query: Tensor, key: Tensor, plain_query: Tensor, plain_key: Tensor,
        ahead: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self.spec = spec
        self.v, self.x, self.before, self.first, self.order, self.sizes = visual, x, previous, embeds, order, size
        self.bias, self.q, self.k, self.plain_q, self.plain_k = bias, query, key, plain_query, plain_key
        self.ahead = ahead

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

    def text_hidden(self) -> Tensor:
        return self.x[:, self.v :]

    def text_embeds(self) -> Tensor:
        assert self.first is not None
        return self.first[:, self.v :]

    def text_mask(self) -> Tensor:
        return (self.order[:, self.v :] < PAD).to(torch.float32)

    def instruction_mask(self) -> Tensor:
        behind = self.order[:, self.v :] > self.order[:, : self.v].amax(1, keepdim=True)
        return behind.to(torch.float32) * self.text_mask()

    def attention_row(self) -> Tensor:
        return self.rows(self.q[:, :, -1:], self.k, self.bias[:, :, -1:]).mean((1, 2))[:, 0, : self.v]

    def plain_row(self) -> Tensor:
        return self.rows(self.plain_q[:, :, -1:], self.plain_k[:, :, : self.v], None).mean((1, 2))[:, 0]

    def next_row(self) -> Tensor:
        q, k, *_, bias = self.ahead
        return self.rows(q[:, :, -1:], k, bias[:, :, -1:]).mean((1, 2))[:, 0, : self.v]

    def text_attention(self) -> Tensor:
        seq = self.x.shape[1]
        bias = self.bias[:, :, self.v : seq]  # the mask is the same for every query head
        return self.rows(self.q[:, :, self.v :], self.k, bias).mean((1, 2))[..., : self.v]

    def visual_attention(self) -> Tensor:
        return self.rows(self.q[:, :, : self.v], self.k, self.bias[:, :, : self.v]).mean((1, 2))[..., : self.v]

    def keys(self) -> Tensor:
        return self.k[:, :, : self.v]

    def next_keys(self) -> Tensor:
        return self.ahead[1][:, :, : self.v]

    def next_plain_queries(self) -> Tensor:
        return self.ahead[2][:, :, : self.v]

    def next_plain_keys(self) -> Tensor:
        return self.ahead[3][:, :, : self.v]

    def rows(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """Attention float32 [batch, kv_heads, group, queries, keys]; bias [batch, 1, queries, keys]."""
        heads, kv_heads = query.shape[1], key.shape[1]
        grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
        found = scores(self.spec, grouped, key.unsqueeze(2), None if bias is None else bias.unsqueeze(1))
        return torch.softmax(found.float(), -1)


class FinalNorm(Atom, RMSNorm):
    """The norm behind the last layer, of the last token: [batch, seq, hidden] → [batch, hidden]."""

    def key(self) -> Hashable:
        return self.eps

    def forward(self, x: Tensor) -> Tensor:
        return RMSNorm.forward(self, x[:, -1])


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
        reductions: (name, fitted method); they cut the layers into KV groups.
        visual: visual tokens that enter the language model.
        prunes: whether they stand in front and are pruned at the cuts (prefill), or have been (decode).
    """

    def __init__(
        self, spec: DecoderSpec, reductions: Sequence[tuple[str, InLLM]] = (), visual: int = 0, prunes: bool = False
    ) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = FinalNorm(spec.hidden, spec.eps, spec.norm_offset)
        self.lm_head = LmHead(spec)
        self.cuts = [layer for _, method in reductions for layer in method.layers]
        self.pruned: dict[int, Cut] = {}
        self.ahead: dict[int, Ahead] = {}
        self.frames = [Frame(spec)]
        self.looks_back = prunes and any({"embeds", "text_embeds"} & set(method.needs) for _, method in reductions)
        present, shift = visual, 0
        for name, method in reductions:
            for layer in method.layers:
                cut = Cut(spec, layer, method, present, method.position == "compact")
                shift += present - method.kept(layer) if cut.compact else 0
                present = method.kept(layer)
                if not prunes:  # then what came before them is gone, and positions are those of the whole prompt
                    self.frames.append(Frame(spec, shift))
                    continue
                self.frames.append(self.frames[0])
                self.pruned[layer] = cut
                self.add_module(name if len(method.layers) == 1 else f"{name}_{layer}", cut)
                if cut.looks_ahead:
                    self.ahead[layer] = Ahead(self.layers[layer])  # type: ignore[arg-type]
                    self.add_module(f"ahead_{layer}", self.ahead[layer])

        for group, frame in enumerate(self.frames if not prunes else self.frames[:1]):
            self.add_module(f"frame_{group}" if group else "frame", frame)

    @property
    def groups(self) -> list[int]:
        """KV group of every layer."""
        return [sum(cut <= i for cut in self.cuts) for i in range(self.spec.layers)]

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
    ) -> tuple[Tensor, ...]:
        """Run prefill or a decode step.

        Args:
            inputs_embeds: [batch, seq, hidden], visual tokens first. position_ids: int64 [batch, seq] or [3, batch, seq].
            order: int64 [batch, seq]. past_keys, past_values: per layer [batch, kv_heads, past, head_dim].
            past_orders: int64, per KV group [batch, past].
            size: float32 [batch, seq], how many tokens each one stands for; attention counts them. past_sizes: as orders.
        Returns:
            logits [batch, vocab] of the last token, present key and value per layer (alternating), present order per
            group, present size per group if there are sizes, and for every pruned layer the kept index int64
            [batch, kept] into that layer's visual tokens.
        """
        x, groups = inputs_embeds, self.groups
        presents: list[Tensor] = []
        orders: list[Tensor] = []
        sizes: list[Tensor] = []
        kept: list[Tensor] = []
        embeds = x if self.looks_back else None
        positions = position_ids
        shared: list[Tensor] = []
        before: tuple[Tensor, ...] = ()  # of the layer before: what entered it, its mask, queries and keys
        for i, layer in enumerate(self.layers):
            if i in self.pruned:
                assert before, "nothing has looked at the tokens before the first layer"
                previous, *seen = before
                ahead: tuple[Tensor, ...] = ()
                if i in self.ahead:
                    cos, sin, bias = self.frames[0].of_layer(i, shared)
                    ahead = (*self.ahead[i](x, cos, sin), bias)
                x, positions, order, *more, index = self.pruned[i](
                    x, previous, embeds, positions, order, size, *seen, *ahead
                )
                size = more.pop(0) if size is not None else None
                embeds = more.pop(0) if embeds is not None else None
                kept.append(index)
            if i == 0 or i in self.cuts:
                group = groups[i]
                past_order = past_orders[group] if past_orders else None
                past_size = past_sizes[group] if past_sizes else None
                total, *shared = self.frames[group](x, positions, order, past_order, size, past_size)
                orders.append(total)
                if size is not None:
                    sizes.append(shared.pop(0))
            past = (past_keys[i], past_values[i]) if past_keys else (None, None)
            cos, sin, bias = self.frames[0].of_layer(i, shared)
            entered = x
            x, key, value, query, plain_query, plain_key = layer(x, cos, sin, bias, *past)
            presents += [key, value]
            before = entered, bias, query, key, plain_query, plain_key
        return (self.lm_head(self.norm(x)), *presents, *orders, *sizes, *kept)
