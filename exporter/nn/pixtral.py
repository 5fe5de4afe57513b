"""The Pixtral vision tower on a static grid: rotary positions by row and column, no class token."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from exporter.nn.atom import Atom
from exporter.nn.decoder_layer import GatedMlp
from exporter.nn.layers import Linear, RMSNorm, attend, merge_heads, rotate, split_heads
from exporter.nn.specs import PixtralSpec
from exporter.nn.vit import FROM_OUTPUT, Tap, parts


class Patches(Atom):
    """[batch, frames, 3, height, width] → [batch * frames, patches, hidden]"""

    def __init__(self, spec: PixtralSpec) -> None:
        super().__init__()
        self.patch_conv = nn.Conv2d(3, spec.hidden, spec.patch, spec.patch, bias=False)
        self.patch_conv.requires_grad_(False)
        self.ln_pre = RMSNorm(spec.hidden, spec.eps)
        self.spec = spec

    def key(self) -> Hashable:
        return self.spec

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.ln_pre(self.patch_conv(pixel_values.flatten(0, 1)).flatten(2).transpose(1, 2))


class Attention(nn.Module):
    def __init__(self, spec: PixtralSpec) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(spec.hidden, spec.hidden, bias=False) for _ in range(4)
        )


class Block(Atom):
    """One block: x [n, patches, hidden] → x, and the rotated q, k [n, heads, patches, head_dim]."""

    def __init__(self, spec: PixtralSpec) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.hidden, spec.eps)
        self.attention = Attention(spec)
        self.ffn_norm = RMSNorm(spec.hidden, spec.eps)
        self.feed_forward = GatedMlp(spec.hidden, spec.intermediate, spec.activation)
        self.spec = spec
        angle = torch.tensor(spec.angles, device="cpu")
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def key(self) -> Hashable:
        return self.spec

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, normed = self.attention, self.attention_norm(x)
        cos, sin = self.get_buffer("cos").to(x.dtype), self.get_buffer("sin").to(x.dtype)
        q, k, v = (split_heads(project(normed), self.spec.heads) for project in (a.q_proj, a.k_proj, a.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        x = x + a.o_proj(merge_heads(attend(q, k, v)))
        return x + self.feed_forward(self.ffn_norm(x)), q, k


class Pixtral(nn.Module):
    """The tower up to its feature block. Taps as in `exporter.nn.vit.Vit`."""

    def __init__(self, spec: PixtralSpec, taps: tuple[str, ...], frames: int) -> None:
        super().__init__()
        self.spec, self.taps = spec, taps
        self.patches = Patches(spec)
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(Block(spec) for _ in range(spec.blocks))})
        for name in taps:
            self.add_module(f"tap_{name}", Tap(spec, parts(name, spec)[0], frames))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """pixel_values [batch, frames, 3, height, width] → the taps in order, leading axes [batch, frames]."""
        x = self.patches(pixel_values)
        found: dict[str, Tensor] = {}
        layers = self.transformer["layers"]
        assert isinstance(layers, nn.ModuleList)
        for i, block in enumerate(layers):
            x, q, k = block(x)
            for name in self.taps:
                kind, at = parts(name, self.spec)
                if i == at:
                    found[name] = self.get_submodule(f"tap_{name}")(*((x,) if kind in FROM_OUTPUT else (q, k)))
        return [found[name] for name in self.taps]
