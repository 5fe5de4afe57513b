"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL on a static grid (what differs is in `QwenVitSpec`): window attention as a
constant permutation, 2×2 merger at the end, mergers on the way (DeepStack)."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor, nn

from exporter.nn.atom import Atom
from exporter.nn.decoder_layer import GatedMlp
from exporter.nn.layers import (
    ACTIVATIONS,
    MASKED,
    LayerNorm,
    Linear,
    Mlp,
    RMSNorm,
    attend,
    attention_map,
    merge_heads,
    rotate,
    split_heads,
)
from exporter.nn.specs import QwenVitSpec
from exporter.nn.vit import Table


class PatchEmbed(Atom):
    """[batch, frames, 3, height, width] → [batch * steps, slots, hidden], patches ordered by window; a lone image is doubled."""

    def __init__(self, spec: QwenVitSpec) -> None:
        super().__init__()
        kernel = (spec.temporal_patch, spec.patch, spec.patch)
        self.proj = nn.Conv3d(3, spec.hidden, kernel, kernel, bias=spec.patch_bias)
        self.proj.requires_grad_(False)
        self.spec = spec
        self.register_buffer("slots", torch.tensor(np.maximum(spec.slots, 0), device="cpu"), persistent=False)

    def key(self) -> Hashable:
        return self.spec

    def forward(self, pixel_values: Tensor) -> Tensor:
        s = self.spec
        if pixel_values.shape[1] == 1:
            pixel_values = pixel_values.repeat(1, s.temporal_patch, 1, 1, 1)
        clips = pixel_values.unflatten(1, (-1, s.temporal_patch)).flatten(0, 1).transpose(1, 2)
        rows, cols = s.grid
        x = self.proj(clips).squeeze(2).reshape(-1, s.hidden, rows, s.merge, cols, s.merge)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(-1, rows * cols * s.merge**2, s.hidden)
        return x.index_select(1, self.get_buffer("slots"))


class Positions(Atom):
    """Adds the learned positions, stretched over the patches: x [n, slots, hidden] → the same."""

    def __init__(self, spec: QwenVitSpec) -> None:
        super().__init__()
        self.weight = Table(spec.table, spec.hidden).weight
        self.spec = spec
        taps, shares = spec.stretched
        self.register_buffer("taps", torch.tensor(taps, device="cpu"), persistent=False)
        self.register_buffer("shares", torch.tensor(shares, device="cpu"), persistent=False)

    def key(self) -> Hashable:
        return self.spec

    def forward(self, x: Tensor) -> Tensor:
        taps, shares = self.get_buffer("taps"), self.get_buffer("shares").to(x.dtype)
        found = self.weight.index_select(0, taps.flatten()).unflatten(0, taps.shape)
        return x + (found * shares.unsqueeze(-1)).sum(1)


class Attention(nn.Module):
    """Holds the projections; the block computes."""

    def __init__(self, spec: QwenVitSpec) -> None:
        super().__init__()
        self.qkv = Linear(spec.hidden, 3 * spec.hidden)
        self.proj = Linear(spec.hidden, spec.hidden)


class Block(Atom):
    """One block with full or window attention: x [n, slots, hidden] → x, and the rotated q, k [n, heads, slots, head_dim]."""

    def __init__(self, spec: QwenVitSpec, full: bool) -> None:
        super().__init__()
        norm = LayerNorm if spec.layer_norm else RMSNorm
        self.norm1 = norm(spec.hidden, 1e-6)
        self.norm2 = norm(spec.hidden, 1e-6)
        self.attn = Attention(spec)
        shape = spec.hidden, spec.intermediate, spec.activation
        self.mlp = GatedMlp(*shape, bias=True) if spec.gated else Mlp(*shape)
        self.spec, self.full = spec, full
        angle = torch.tensor(spec.angles, dtype=torch.float32, device="cpu")
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.register_buffer("bias", pad_bias(spec, full), persistent=False)

    def key(self) -> Hashable:
        return self.spec, self.full

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.spec
        cos, sin = self.get_buffer("cos").to(x.dtype), self.get_buffer("sin").to(x.dtype)
        q, k, v = (split_heads(t, s.heads) for t in self.attn.qkv(self.norm1(x)).chunk(3, -1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        bias = self.get_buffer("bias").to(x.dtype) if s.padded else None
        if self.full:
            out = attend(q, k, v, bias)
        else:
            windows = len(s.windows)
            q_, k_, v_ = (t.unflatten(2, (windows, -1)).transpose(1, 2) for t in (q, k, v))
            out = attend(q_, k_, v_, bias).transpose(1, 2).flatten(2, 3)
        x = x + self.attn.proj(merge_heads(out))
        return x + self.mlp(self.norm2(x)), q, k


def pad_bias(spec: QwenVitSpec, full: bool) -> Tensor:
    """Additive mask of padded slots: [1, 1, 1, slots] for full, [1, windows, 1, 1, slots per window] for window attention."""
    bias = torch.where(torch.tensor(spec.slots < 0, device="cpu"), MASKED, 0.0)
    return bias[None, None, None] if full else bias.reshape(1, len(spec.windows), 1, 1, -1)


class Merger(Atom):
    """Norm, concatenate merge² patches, two-layer MLP to the language model's width. `joint`: the norm is that of the
    concatenated patches."""

    def __init__(self, spec: QwenVitSpec, joint: bool = False) -> None:
        super().__init__()
        wide = spec.hidden * spec.merge**2
        norm = LayerNorm if spec.layer_norm else RMSNorm
        self.ln_q = norm(wide if joint else spec.hidden, 1e-6)
        self.mlp = nn.ModuleList([Linear(wide, wide), nn.Identity(), Linear(wide, spec.out)])
        self.wide, self.joint = wide, joint
        self.spec = spec

    def key(self) -> Hashable:
        return self.spec, self.joint

    def forward(self, x: Tensor) -> Tensor:
        """[n, patches, hidden] -> [n, tokens, out]"""
        if self.joint:
            x = self.ln_q(self.beside(x))
        else:
            x = self.beside(self.ln_q(x))
        return self.mlp[2](ACTIVATIONS["gelu"](self.mlp[0](x)))

    def beside(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.wide)


class Tap(Atom):
    """A signal in raster order of the merged tokens, leading axes [batch, steps]; per-patch values are averaged."""

    def __init__(self, spec: QwenVitSpec, kind: str, steps: int) -> None:
        super().__init__()
        self.spec, self.kind, self.steps = spec, kind, steps
        self.register_buffer("raster", torch.tensor(spec.raster, device="cpu"), persistent=False)
        self.register_buffer("bias", pad_bias(spec, full=True), persistent=False)

    def key(self) -> Hashable:
        return self.spec, self.kind, self.steps

    def forward(self, *values: Tensor) -> Tensor:
        out: Tensor = getattr(self, self.kind)(*values)
        return out.index_select(1, self.get_buffer("raster")).unflatten(0, (-1, self.steps))

    def hidden(self, tokens: Tensor) -> Tensor:
        return tokens

    def patches(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.spec.merge**2)).mean(2)

    def deepstack(self, *planes: Tensor) -> Tensor:
        return torch.cat(planes, -1)

    def keys(self, q: Tensor, k: Tensor) -> Tensor:
        return k.mean(1).unflatten(1, (-1, self.spec.merge**2)).mean(2)

    def joint_keys(self, q: Tensor, k: Tensor) -> Tensor:
        return merge_heads(k).unflatten(1, (-1, self.spec.merge**2)).mean(2)

    def column_attention(self, q: Tensor, k: Tensor) -> Tensor:
        real = (self.get_buffer("bias")[0, 0, 0] == 0).float()
        rows = attention_map(q, k, self.get_buffer("bias").to(q.dtype) if self.spec.padded else None)
        column = (real @ rows) / real.sum() if self.spec.padded else rows.mean(1)
        return column.unflatten(1, (-1, self.spec.merge**2)).mean(2)


class QwenVit(nn.Module):
    """The tower with its merger; `hidden` is at the language model's width. Taps as in `exporter.nn.vit.Vit`."""

    def __init__(self, spec: QwenVitSpec, taps: tuple[str, ...], steps: int) -> None:
        super().__init__()
        self.spec, self.taps = spec, taps
        self.patch_embed = PatchEmbed(spec)
        if spec.table:
            self.pos_embed = Positions(spec)
        self.blocks = nn.ModuleList(Block(spec, i in spec.full) for i in range(spec.blocks))
        self.merger = Merger(spec)
        self.planes = nn.ModuleList(Merger(spec, joint=True) for _ in spec.planes)
        for name in taps:
            self.add_module(f"tap_{name}", Tap(spec, name.partition("@")[0], steps))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """pixel_values [batch, frames, 3, height, width] → the taps in order, leading axes [batch, steps]."""
        x = self.patch_embed(pixel_values)
        if self.spec.table:
            x = self.pos_embed(x)
        planes: list[Tensor] = []
        found: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x, q, k = block(x)
            if i in self.spec.planes:
                planes.append(self.planes[len(planes)](x))
            for name in self.taps:
                kind, _, at = name.partition("@")
                if name not in ("hidden", "deepstack") and i == (int(at) if at else self.spec.full[-1]):
                    values = (x,) if kind == "patches" else (q, k)
                    found[name] = self.get_submodule(f"tap_{name}")(*values)
        found["hidden"] = self.get_submodule("tap_hidden")(self.merger(x))
        if "deepstack" in self.taps:
            found["deepstack"] = self.get_submodule("tap_deepstack")(*planes)
        return [found[name] for name in self.taps]
