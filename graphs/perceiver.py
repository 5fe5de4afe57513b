"""Project with Flamingo's Perceiver Resampler: a few latents that read the image, or a whole clip, layer after layer.

hidden [batch, frames, tokens, dim] → tokens [batch, frames, latents, llm_dim], of a clip read as one [batch, 1, latents, llm_dim].

1. Where a clip is read as one, each frame's vector is added to its tokens, and all tokens stand in a row.
2. In every layer the latents attend to the tokens and to themselves, side by side, and go through an MLP; norms are in front,
   what came in is added.
3. A layer norm, and a linear layer where the language model has another width.

Source: Alayrac et al. 2022, "Flamingo: a Visual Language Model for Few-Shot Learning", arXiv:2204.14198, in the layout of
OpenFlamingo. Step 3's linear layer is xGen-MM's (BLIP-3, arXiv:2408.08872), which puts the latents among the tokens of the
language model; Flamingo's own reads them through layers of cross-attention, which decoders here do not have.
Knobs:
    latents: tokens that leave (xGen-MM: 128).
    layers, heads, head_dim: of the attention (xGen-MM: 6, 16, 96).
    times: frames that were trained with vectors of their own: a clip of at most so many is read as one. By default, as in
        OpenFlamingo and xGen-MM, frames are read apart and have none.
    weights: the published checkpoint, or its tensors `perceiver.…` (xGen-MM: `vlm.vision_tokenizer.…`) alone.
Position: one each, as if the tower had given so many; the tokens lie in no raster. Of a clip read as one: counted anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import (
    Compressor,
    Shapes,
    attention,
    compressed,
    layer_norm,
    linear,
    linear_shapes,
    mlp,
    norm_shapes,
    shortens,
)
from graphs._contract import ReductionError, Signals, Site
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("perceiver:layers=2", "perceiver:layers=2,latents=16,times=8")
SWEEP = "perceiver:layers=2,latents=16"
EXPANSION = 4


@dataclass(frozen=True)
class Perceiver(Compressor):
    """Flamingo's resampler."""

    paper: ClassVar[str] = "Alayrac et al. 2022, arXiv:2204.14198"
    prefixes: ClassVar[tuple[str, ...]] = ("", "perceiver.", "vlm.vision_tokenizer.")

    latents: int = 64
    layers: int = 6
    heads: int = 8
    head_dim: int = 64
    times: int | None = None

    def fitted(self, site: Site) -> Perceiver:
        for knob in ("latents", "layers", "heads", "head_dim"):
            if getattr(self, knob) < 1:
                raise ReductionError(f"`{knob}` must be at least 1; found {getattr(self, knob)}")
        if self.times is not None and self.times < site.frames:
            raise ReductionError(f"`times` = {self.times} frames were trained, too few for a clip of {site.frames}")
        shortens(site, self.after(site))
        return self

    def after(self, site: Site) -> Site:
        return compressed(site, self.latents, site.frames if self.times is None else 1)

    def trained(self, site: Site) -> Shapes:
        inner = self.heads * self.head_dim
        shapes: Shapes = {"latents": (self.latents, site.dim)}
        if self.times is not None:
            shapes["frame_embs"] = (self.times, site.dim)
        for i in range(self.layers):
            shapes |= norm_shapes(f"layers.{i}.0.norm_media", site.dim)
            shapes |= norm_shapes(f"layers.{i}.0.norm_latents", site.dim)
            shapes |= linear_shapes(f"layers.{i}.0.to_q", site.dim, inner, bias=False)
            shapes |= linear_shapes(f"layers.{i}.0.to_kv", site.dim, 2 * inner, bias=False)
            shapes |= linear_shapes(f"layers.{i}.0.to_out", inner, site.dim, bias=False)
            shapes |= norm_shapes(f"layers.{i}.1.0", site.dim)
            shapes |= linear_shapes(f"layers.{i}.1.1", site.dim, EXPANSION * site.dim, bias=False)
            shapes |= linear_shapes(f"layers.{i}.1.3", EXPANSION * site.dim, site.dim, bias=False)
        shapes |= norm_shapes("norm", site.dim)
        return shapes if site.dim == site.llm_dim else shapes | linear_shapes("projection", site.dim, site.llm_dim)

    def forward(self, signals: Signals, site: Site) -> Tensor:
        x = signals["hidden"]
        if self.times is None:
            x = x.flatten(0, 1)
        else:
            x = (x + signals["frame_embs"][: site.frames, None]).flatten(1, 2)
        latents = signals["latents"].unsqueeze(0)
        for i in range(self.layers):
            latents = latents + self._attend(signals, f"layers.{i}.0", x, latents)
            normed = layer_norm(signals, f"layers.{i}.1.0", latents)
            latents = latents + mlp(signals, f"layers.{i}.1.1", f"layers.{i}.1.3", normed)
        latents = layer_norm(signals, "norm", latents)
        if "projection.weight" in signals:
            latents = linear(signals, "projection", latents)
        out: Tensor = latents.unflatten(0, (-1, self.after(site).frames))
        return out

    def _attend(self, signals: Signals, name: str, x: Tensor, latents: Tensor) -> Tensor:
        latents = layer_norm(signals, f"{name}.norm_latents", latents)
        beside = latents.expand(x.shape[0], -1, -1)
        seen = torch.cat([layer_norm(signals, f"{name}.norm_media", x), beside], 1)
        keys, values = linear(signals, f"{name}.to_kv", seen).chunk(2, -1)
        out = attention(linear(signals, f"{name}.to_q", latents), keys, values, self.heads)
        return linear(signals, f"{name}.to_out", out)


METHOD = Perceiver
