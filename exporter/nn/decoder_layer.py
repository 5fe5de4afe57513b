"""One layer of a Llama-type decoder (what differs between families is in `DecoderSpec`), and what layers share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from exporter.nn.atom import Atom
from exporter.nn.layers import ACTIVATIONS, MASKED, LayerNorm, Linear, Mlp, PackedLinear, RMSNorm, merge_heads, rotate
from exporter.nn.seen import scores
from exporter.nn.specs import DecoderSpec

T = TypeVar("T")


class Attention(nn.Module):
    """Grouped-query attention in *fold* form: the queries of a KV head are stacked along the token axis, which is one
    of the two masked forms that TensorRT fuses, and as fast as any on ONNX Runtime."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        kv = spec.kv_heads * spec.head_dim
        parts = {"q_proj": spec.heads * spec.head_dim, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = PackedLinear(spec.hidden, parts, spec.qkv_bias)
        self.o_proj = Linear(spec.heads * spec.head_dim, spec.hidden, spec.output_bias)
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, spec.eps, spec.norm_offset)
            self.k_norm = RMSNorm(spec.head_dim, spec.eps, spec.norm_offset)

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, bias: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, ...]:
        """x [batch, seq, hidden]; bias [batch, 1, group * seq, total]; past [batch, kv_heads, past, head_dim].

        Returns the output, present key and value, and what a reduction may look at: the rotated queries [batch, heads, seq,
        head_dim], and queries and keys before the rotation."""
        plain_q, plain_k, v = self.plain(x)
        q, k = rotate(plain_q, cos, sin), rotate(plain_k, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.o_proj(self.read(q, k, v, bias)), k, v, q, plain_q, plain_k

    def read(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """What queries [batch, heads, seq, head_dim] read of keys and values: [batch, seq, heads * head_dim]."""
        s, seq = self.spec, q.shape[2]
        folded = q.reshape(-1, s.kv_heads, s.heads // s.kv_heads * seq, s.head_dim)
        out = torch.softmax(scores(s, folded, k, bias).float(), -1).to(v.dtype) @ v
        return merge_heads(out.reshape(-1, s.heads, seq, s.head_dim))

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [batch, heads, seq, head_dim], keys and values [batch, kv_heads, seq, head_dim] before the rotation, normed
        where the decoder norms them."""
        return self.by_head(*self.qkv_proj.split(x))

    def by_head(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of projected queries, keys and values [batch, seq, heads * head_dim]."""
        s = self.spec
        q, k, v = (part.unflatten(-1, (-1, s.head_dim)) for part in (q, k, v))
        if s.qk_norm:  # behind the transposition ONNX Runtime would move that through the norm, and not fuse it
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class GatedMlp(nn.Module):
    def __init__(self, hidden: int, intermediate: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias)
        self.up_proj = Linear(hidden, intermediate, bias)
        self.down_proj = Linear(intermediate, hidden, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class Pair:
    """Matrices that read, channel by channel, what one module gives: dividing its weights (and bias) there and multiplying the
    matrices' rows leaves what the layer computes as it is. columns: of the giver's output."""

    giver: nn.Module
    columns: slice
    readers: tuple[Linear, ...]


def norm(spec: DecoderSpec) -> nn.Module:
    return LayerNorm(spec.hidden, spec.eps) if spec.layer_norms else RMSNorm(spec.hidden, spec.eps, spec.norm_offset)


class Layer(Atom):
    """One decoder layer. With `post_norms`, `post_attention_layernorm` is what it is called; without, it is the norm
    before the MLP: the names are the checkpoints'."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.input_layernorm = norm(spec)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = norm(spec)
        if spec.post_norms:
            self.pre_feedforward_layernorm = norm(spec)
            self.post_feedforward_layernorm = norm(spec)
        mlp = GatedMlp if spec.gated else Mlp
        self.mlp = mlp(spec.hidden, spec.intermediate, spec.activation)

    def key(self) -> Hashable:
        return self.self_attn.spec

    def pairs(self) -> list[Pair]:
        """Groups of matrices with one input, but for those that read values which several query heads share."""
        a, whole = self.self_attn, slice(None)
        before = self.pre_feedforward_layernorm if a.spec.post_norms else self.post_attention_layernorm
        found = [Pair(self.input_layernorm, whole, (a.qkv_proj,))]
        if isinstance(self.mlp, GatedMlp):
            found.append(Pair(before, whole, (self.mlp.gate_proj, self.mlp.up_proj)))
            found.append(Pair(self.mlp.up_proj, whole, (self.mlp.down_proj,)))
        else:  # behind an activation nothing can be divided
            found.append(Pair(before, whole, (self.mlp.fc1,)))
        if a.spec.heads == a.spec.kv_heads:
            values = slice(-a.qkv_proj.parts["v_proj"], None)
            found.append(Pair(a.qkv_proj, values, (a.o_proj,)))
        return found

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        bias: Tensor,
        past_key: Tensor | None,
        past_value: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Returns x, the present key and value, the rotated queries, queries and keys before the rotation, and x behind
        attention."""
        past = None if past_key is None or past_value is None else (past_key, past_value)
        out, *rest = self.self_attn(self.input_layernorm(x), cos, sin, bias, past)
        x, attended = self.behind(x, out)
        return (x, *rest, attended)

    def behind(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves the layer, given what entered it and what attention found, and x behind attention."""
        if not self.self_attn.spec.post_norms:
            x = x + out
            return x + self.mlp(self.post_attention_layernorm(x)), x
        x = x + self.post_attention_layernorm(out)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), x


class Frame(Atom):
    """What the layers of a KV group share: order (and size) of all its tokens, rotary factors for each set of frequencies, a
    mask for each sliding window."""

    def __init__(self, spec: DecoderSpec, shift: int = 0, readers: tuple[int, int] = (0, 0)) -> None:
        """`shift`: how far the positions of what follows the image have moved up. `readers`: visual tokens in front, and how
        many tokens behind the image see them; if there are any, no other text does."""
        super().__init__()
        self.spec, self.shift, self.readers = spec, shift, readers
        self.windows = tuple(dict.fromkeys(spec.windows))
        self.frequencies = tuple(filter(None, dict.fromkeys(map(spec.frequencies, range(spec.layers)))))
        for i, inv_freq in enumerate(self.frequencies):
            values = torch.tensor(inv_freq, dtype=torch.float32, device="cpu")
            self.register_buffer(f"inv_freq_{i}", values, persistent=False)
        if spec.mrope_section is not None:
            follows = torch.tensor(spec.rotary_axes, device="cpu") == torch.arange(3, device="cpu")[:, None]
            self.register_buffer("follows", follows.float()[:, None, None], persistent=False)

    def key(self) -> Hashable:
        return self.spec, self.shift, self.readers

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        order: Tensor,
        past_order: Tensor | None,
        size: Tensor | None,
        past_size: Tensor | None,
        reach: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """order, and size if given, with the past [batch, total]; cos, sin [batch, 1, seq, head_dim / 2] for each set of
        frequencies; masks [batch, 1, group * seq, total], to which log(size) of the keys is added.

        Where every KV head keeps tokens of its own, past_order and past_size are [batch, kv_heads, past]; then what comes
        out has that axis, too."""
        s = self.spec
        if self.shift:
            position_ids = position_ids - self.shift
        rotary = self.rotary(position_ids, x.dtype)
        total = _appended(past_order, order)
        sizes = [] if size is None else [_appended(past_size, size)]
        allowed = torch.log(_by_head(sizes[0]))[:, :, None, :] if sizes else torch.zeros(())
        q, kv = order[:, None, :, None], _by_head(total)[:, :, None, :]
        seen = kv <= (q if reach is None else reach[:, None, :, None])
        visual, readers = self.readers
        if readers:
            last = order[:, :visual].amax(1)[:, None, None, None] + readers
            text = torch.cat([torch.zeros_like(order[:, :visual]), torch.ones_like(order[:, visual:])], 1)
            seen = seen & ((q <= last) | (text[:, None, None, :] > 0))
        masks = []
        for window in self.windows:
            visible = seen if window is None else seen & (kv > q - window)
            bias = torch.where(visible, allowed, MASKED).to(x.dtype)
            masks.append(torch.cat([bias] * (s.heads // s.kv_heads), 2))
        return (total, *sizes, *rotary, *masks)

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """cos, sin [batch, 1, seq, head_dim / 2] for each set of frequencies."""
        s, found = self.spec, []
        for i in range(len(self.frequencies)):
            angle = position_ids.float().unsqueeze(-1) * self.get_buffer(f"inv_freq_{i}")
            if s.mrope_section is not None:
                angle = (angle * self.get_buffer("follows")).sum(0)
            angle = angle.unsqueeze(1)
            cos, sin = torch.cos(angle), torch.sin(angle)
            if s.rope_scale != 1.0:
                cos, sin = cos * s.rope_scale, sin * s.rope_scale
            found += [cos.to(dtype), sin.to(dtype)]
        return found

    def of_layer(self, layer: int, shared: Sequence[T]) -> tuple[T | None, T | None, T]:
        """cos, sin (None where nothing is turned) and mask of one layer. shared: what `forward` returns behind order and size."""
        mask = shared[2 * len(self.frequencies) :][self.windows.index(self.spec.windows[layer])]
        if not self.frequencies:
            return None, None, mask
        pair = 2 * self.frequencies.index(self.spec.frequencies(layer))
        return shared[pair], shared[pair + 1], mask


def _appended(past: Tensor | None, x: Tensor) -> Tensor:
    """x [batch, seq] behind the past [batch, past] or [batch, kv_heads, past]."""
    if past is None:
        return x
    return torch.cat([past, x if past.ndim == 2 else x[:, None].expand(-1, past.shape[1], -1)], -1)


def _by_head(x: Tensor) -> Tensor:
    """[batch, n] or [batch, kv_heads, n] → [batch, 1 or kv_heads, n]."""
    return x[:, None] if x.ndim == 2 else x
