"""CLIP and SigLIP vision towers, with taps for the signals a reduction needs and a site for in-tower reductions."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exporter.nn.atom import Atom
from exporter.nn.layers import ACTIVATIONS, LayerNorm, Linear, attend, attention_map, merge_heads, split_heads
from graphs._blocks import take
from graphs._contract import InTower


@dataclass(frozen=True)
class VitSpec:
    """`cls`: a class token at 0. `pre_norm`: CLIP's norm before the first block. `blocks`: how many blocks run, i.e. the
    feature is the output of block `blocks - 1`."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    patch: int
    image: int
    eps: float
    activation: str
    cls: bool
    pre_norm: bool
    patch_bias: bool

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image // self.patch
        return side, side


class Embeddings(Atom):
    """Patches, class token and learned positions. [batch, frames, 3, height, width] → [batch * frames, tokens, hidden]"""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        rows, cols = spec.grid
        self.patch_embedding = nn.Conv2d(3, spec.hidden, spec.patch, spec.patch, bias=spec.patch_bias)
        self.patch_embedding.requires_grad_(False)
        if spec.cls:
            self.class_embedding = nn.Parameter(torch.empty(spec.hidden), requires_grad=False)
        self.position_embedding = Table(rows * cols + spec.cls, spec.hidden)
        self.spec = spec

    def key(self) -> Hashable:
        return self.spec

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values.flatten(0, 1)).flatten(2).transpose(1, 2)
        if self.spec.cls:
            x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1)
        return x + self.position_embedding.weight


class Table(nn.Module):
    """A learned table that is added whole; keeps the parameter name of torch.nn.Embedding."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim), requires_grad=False)


class SelfAttention(nn.Module):
    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, Linear(spec.hidden, spec.hidden))
        self.heads = spec.heads

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output and the q, k that made it, [batch, heads, tokens, head_dim]."""
        q, k, v = (split_heads(self.get_submodule(f"{n}_proj")(x), self.heads) for n in "qkv")
        return self.get_submodule("out_proj")(merge_heads(attend(q, k, v, bias))), q, k


class Mlp(nn.Module):
    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.fc1 = Linear(spec.hidden, spec.intermediate)
        self.fc2 = Linear(spec.intermediate, spec.hidden)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(Atom):
    """One tower block: x [n, tokens, hidden] → x, and the q, k of its attention."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(spec.hidden, spec.eps)
        self.self_attn = SelfAttention(spec)
        self.layer_norm2 = LayerNorm(spec.hidden, spec.eps)
        self.mlp = Mlp(spec)
        self.spec = spec

    def key(self) -> Hashable:
        return self.spec

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, q, k = self.self_attn(self.layer_norm1(x), None)
        x = x + out
        return x + self.mlp(self.layer_norm2(x)), q, k


class MergingBlock(Block):
    """A block with an in-tower reduction between attention and MLP. Attention is proportional to token size."""

    def __init__(self, spec: VitSpec, index: int, name: str, method: InTower) -> None:
        super().__init__(spec)
        self.index, self.name, self.method = index, name, method
        self.add_module(name, _Merge(method))

    def key(self) -> Hashable:
        return self.spec, self.index, self.name, self.method

    def forward(  # type: ignore[override]
        self, x: Tensor, size: Tensor | None, anchor: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """size float32 [n, tokens], anchor int64 [n, tokens] (None before the first block) → x, size, anchor."""
        if size is None or anchor is None:
            bias = None
            size = torch.ones_like(x[..., 0], dtype=torch.float32)
            anchor = size.to(torch.int64) * torch.arange(x.shape[1])
        else:
            bias = torch.log(size)[:, None, None, :].to(x.dtype)
        out, _, k = self.self_attn(self.layer_norm1(x), bias)
        x, index, size = self.get_submodule(self.name)(self.index, x + out, k.mean(1), size, int(self.spec.cls))
        return x + self.mlp(self.layer_norm2(x)), size, take(anchor, index)


class _Merge(nn.Module):
    """Gives the reduction's nodes its name in the graph."""

    def __init__(self, method: InTower) -> None:
        super().__init__()
        self.method = method

    def forward(
        self, block: int, x: Tensor, keys: Tensor, size: Tensor, cls_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = self.method.forward(block, x, keys, size, cls_tokens)
        assert out.size is not None
        return out.tokens, out.index, out.size


class PreNorm(Atom, LayerNorm):
    """CLIP's norm before the first block."""

    def key(self) -> Hashable:
        return self.eps


class Tap(Atom):
    """A signal from the q, k of one block, or from the tower's output; unfolds [batch * frames, ...] to [batch, frames, ...]."""

    def __init__(self, kind: str, cls: int, frames: int) -> None:
        super().__init__()
        self.kind, self.cls, self.frames = kind, cls, frames

    def key(self) -> Hashable:
        return self.kind, self.cls, self.frames

    def forward(self, *values: Tensor) -> Tensor:
        out: Tensor = getattr(self, self.kind)(*values)
        return out.unflatten(0, (-1, self.frames))

    def hidden(self, x: Tensor) -> Tensor:
        return x[:, self.cls :]

    def cls_token(self, x: Tensor) -> Tensor:
        return x[:, 0]

    def anchor(self, anchor: Tensor) -> Tensor:
        return anchor[:, self.cls :] - self.cls

    def keys(self, q: Tensor, k: Tensor) -> Tensor:
        return k.mean(1)[:, self.cls :]

    def cls_keys(self, q: Tensor, k: Tensor) -> Tensor:
        return k.mean(1)[:, 0]

    def cls_attention(self, q: Tensor, k: Tensor) -> Tensor:
        return attention_map(q[:, :, :1], k)[:, 0, 1:]

    def column_attention(self, q: Tensor, k: Tensor) -> Tensor:
        return attention_map(q, k).mean(1)[:, self.cls :]


FROM_OUTPUT = {"hidden": "hidden", "cls": "cls_token"}
"""Signals read from the tower's output, and the tap's method for each."""


class Vit(nn.Module):
    """The tower up to its feature block.

    Args:
        taps: signals to output, e.g. ("hidden", "cls_attention", "keys@7"); see `graphs._contract`.
        frames: frames of a sample.
        in_tower: (name, fitted method) or None.
    """

    def __init__(
        self, spec: VitSpec, taps: tuple[str, ...], frames: int, in_tower: tuple[str, InTower] | None = None
    ) -> None:
        super().__init__()
        self.spec, self.taps = spec, taps
        self.embeddings = Embeddings(spec)
        if spec.pre_norm:
            self.pre_layrnorm = PreNorm(spec.hidden, spec.eps)
        blocks = [MergingBlock(spec, i, *in_tower) if in_tower else Block(spec) for i in range(spec.blocks)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.merging = in_tower is not None
        for name in taps:
            kind = name.partition("@")[0]
            self.add_module(f"tap_{name}", Tap(FROM_OUTPUT.get(kind, kind), int(spec.cls), frames))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """pixel_values [batch, frames, 3, height, width] → the taps in order, leading axes [batch, frames]."""
        x = self.embeddings(pixel_values)
        if self.spec.pre_norm:
            x = self.pre_layrnorm(x)
        found: dict[str, Tensor] = {}
        size = anchor = None
        layers = self.encoder["layers"]
        assert isinstance(layers, nn.ModuleList)
        for i, block in enumerate(layers):
            if self.merging:
                x, size, anchor = block(x, size, anchor)
                continue
            x, q, k = block(x)
            for name in self.taps:
                kind, _, at = name.partition("@")
                if kind not in FROM_OUTPUT and i == (int(at) if at else self.spec.blocks - 1):
                    found[name] = self.get_submodule(f"tap_{name}")(q, k)
        for name in self.taps:
            if name in FROM_OUTPUT:
                found[name] = self.get_submodule(f"tap_{name}")(x)
            elif name == "anchor":
                found[name] = self.get_submodule(f"tap_{name}")(anchor)
        return [found[name] for name in self.taps]


def tower_signals(spec: VitSpec) -> frozenset[str]:
    """Signals this tower can supply at any of its blocks."""
    per_block = {"keys", "column_attention"} | ({"cls_attention", "cls_keys"} if spec.cls else set())
    anywhere = {f"{s}@{b}" for s in per_block for b in range(spec.blocks)}
    return frozenset({"hidden"} | ({"cls"} if spec.cls else set()) | per_block | anywhere)


class Projector(nn.Module):
    """LLaVA's two-layer MLP from tower width to the language model's."""

    def __init__(self, inputs: int, outputs: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, outputs, bias)
        self.linear_2 = Linear(outputs, outputs, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))
