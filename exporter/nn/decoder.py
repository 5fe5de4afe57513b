"""A Llama-type decoder (Llama, Mistral, Qwen2, M-RoPE) that prunes visual tokens between layers and keeps one KV length
per group of layers. `exporter.graphset` describes the inputs: visual tokens first, `order` carries causality."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from exporter.nn.atom import Atom
from exporter.nn.layers import ACTIVATIONS, MASKED, Linear, RMSNorm, merge_heads, rotate, split_heads
from exporter.nn.specs import DecoderSpec
from graphs._blocks import take
from graphs._contract import InLLM


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

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [batch, seq, hidden]; bias [batch, 1, group * seq, total]; past [batch, kv_heads, past, head_dim].

        Returns the output, present key and value, and the rotated queries [batch, heads, seq, head_dim]."""
        s = self.spec
        q = rotate(split_heads(self.q_proj(x), s.heads), cos, sin)
        k = rotate(split_heads(self.k_proj(x), s.kv_heads), cos, sin)
        v = split_heads(self.v_proj(x), s.kv_heads)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seq = x.shape[1]
        folded = q.reshape(-1, s.kv_heads, s.heads // s.kv_heads * seq, s.head_dim)
        scores = (folded * s.head_dim**-0.5) @ k.transpose(-1, -2) + bias
        out = torch.softmax(scores.float(), -1).to(v.dtype) @ v
        return self.o_proj(merge_heads(out.reshape(-1, s.heads, seq, s.head_dim))), k, v, q


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
    """One decoder layer."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden, spec.eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden, spec.eps)
        self.mlp = Mlp(spec.hidden, spec.intermediate, spec.activation)

    def key(self) -> Hashable:
        return self.self_attn.spec

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, past_key: Tensor | None, past_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns x, the present key and value, and the rotated queries."""
        past = None if past_key is None or past_value is None else (past_key, past_value)
        out, key, value, query = self.self_attn(self.input_layernorm(x), cos, sin, bias, past)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), key, value, query


class Frame(Atom):
    """What the layers of a KV group share: rotary factors, order (and size) of all its tokens, a mask per sliding window."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.windows = tuple(dict.fromkeys(spec.windows))
        self.register_buffer(
            "inv_freq", torch.tensor(spec.inv_freq, dtype=torch.float32, device="cpu"), persistent=False
        )

    def key(self) -> Hashable:
        return self.spec

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        order: Tensor,
        past_order: Tensor | None,
        size: Tensor | None,
        past_size: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """cos, sin [batch, 1, seq, head_dim / 2]; order, and size if given, with the past [batch, total]; masks
        [batch, 1, group * seq, total], to which log(size) of the keys is added."""
        s = self.spec
        angle = position_ids.float().unsqueeze(-1) * self.get_buffer("inv_freq")
        if s.mrope_section is not None:
            parts = angle.split(list(s.mrope_section), -1)
            angle = torch.cat([part[axis] for axis, part in enumerate(parts)], -1)
        angle = angle.unsqueeze(1)
        cos, sin = torch.cos(angle), torch.sin(angle)
        if s.rope_scale != 1.0:
            cos, sin = cos * s.rope_scale, sin * s.rope_scale
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
        return (cos.to(x.dtype), sin.to(x.dtype), total, *sizes, *masks)


class Cut(Atom):
    """A reduction before one layer: scores from the layer before, then all there is per token is gathered."""

    def __init__(self, spec: DecoderSpec, layer: int, method: InLLM, visual: int) -> None:
        super().__init__()
        self.spec, self.layer, self.method, self.visual = spec, layer, method, visual

    def key(self) -> Hashable:
        return self.spec, self.layer, self.method, self.visual

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor,
        x: Tensor,
        position_ids: Tensor,
        order: Tensor,
        size: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Returns x, position_ids, order, and size if given, without the dropped tokens, and the kept index int64
        [batch, kept]."""
        row = self.attention_row(query, key, bias[:, :, -1:])
        signals = {"attention_row": row[:, : self.visual], "hidden": x[:, : self.visual]}
        index = self.method.forward(self.layer, signals)
        if position_ids.ndim == 3:
            position_ids = torch.stack([self.prune(axis, index) for axis in position_ids.unbind(0)])
        else:
            position_ids = self.prune(position_ids, index)
        sizes = [] if size is None else [self.prune(size, index)]
        return (self.prune(x, index), position_ids, self.prune(order, index), *sizes, index)

    def prune(self, x: Tensor, index: Tensor) -> Tensor:
        """x [batch, seq, ...]: keep `index` of the visual tokens in front and all that follow."""
        return torch.cat([take(x[:, : self.visual], index), x[:, self.visual :]], 1)

    def attention_row(self, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        """Attention of the last token over all keys, mean over heads: float32 [batch, total]."""
        s = self.spec
        last = query[:, :, -1:].reshape(-1, s.kv_heads, s.heads // s.kv_heads, s.head_dim)
        scores = (last * s.head_dim**-0.5) @ key.transpose(-1, -2) + bias
        return torch.softmax(scores.float(), -1).mean((1, 2))


class FinalNorm(Atom, RMSNorm):
    """The norm behind the last layer, of the last token: [batch, seq, hidden] → [batch, hidden]."""

    def key(self) -> Hashable:
        return self.eps

    def forward(self, x: Tensor) -> Tensor:
        return RMSNorm.forward(self, x[:, -1])


class LmHead(Atom, Linear):
    """[batch, hidden] → logits [batch, vocab]."""

    def key(self) -> Hashable:
        return tuple(self.weight.shape)


class Decoder(nn.Module):
    """Decoder layers, final norm and LM head.

    Args:
        reductions: (name, fitted method); they cut the layers into KV groups.
        visual: visual tokens in front, to be pruned at the cuts (prefill); None prunes nothing (decode).
    """

    def __init__(
        self, spec: DecoderSpec, reductions: Sequence[tuple[str, InLLM]] = (), visual: int | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.frame = Frame(spec)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = FinalNorm(spec.hidden, spec.eps)
        self.lm_head = LmHead(spec.hidden, spec.vocab, bias=False)
        self.cuts = [layer for _, method in reductions for layer in method.layers]
        self.pruned: dict[int, Cut] = {}
        if visual is not None:
            for name, method in reductions:
                for layer in method.layers:
                    cut = Cut(spec, layer, method, visual)
                    self.add_module(name if len(method.layers) == 1 else f"{name}_{layer}", cut)
                    self.pruned[layer] = cut
                    visual = method.kept(layer)

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
        before: tuple[Tensor, Tensor, Tensor] | None = None  # query, key and mask of the layer before
        for i, layer in enumerate(self.layers):
            if i in self.pruned:
                assert before is not None, "nothing has looked at the tokens before the first layer"
                x, position_ids, order, *more, index = self.pruned[i](*before, x, position_ids, order, size)
                size = more[0] if more else None
                kept.append(index)
            if i == 0 or i in self.cuts:
                group = groups[i]
                past_order = past_orders[group] if past_orders else None
                past_size = past_sizes[group] if past_sizes else None
                cos, sin, total, *masks = self.frame(x, position_ids, order, past_order, size, past_size)
                orders.append(total)
                if size is not None:
                    sizes.append(masks.pop(0))
            past = (past_keys[i], past_values[i]) if past_keys else (None, None)
            bias = masks[self.frame.windows.index(self.spec.windows[i])]
            x, key, value, query = layer(x, cos, sin, bias, *past)
            presents += [key, value]
            before = query, key, bias
        return (self.lm_head(self.norm(x)), *presents, *orders, *sizes, *kept)
