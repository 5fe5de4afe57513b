"""Project with TokenPacker: a coarse grid of queries, each of which attends to the fine tokens of its own region.

hidden [batch, frames, tokens, dim], patches@b [batch, frames, tokens, patch_dim] of four tower blocks
→ tokens [batch, frames, tokens / scale², llm_dim].

1. Queries: `hidden` resized to 1/scale of the raster (bilinear), a linear layer, a layer norm.
2. Keys, values: the patches of the blocks side by side, Linear, GELU, Linear, a layer norm.
3. Each query attends, with several heads, to the scale × scale tokens of its cell.
4. Linear, GELU, Linear to the language model's width.

Source: Li et al. 2024, "TokenPacker: Efficient Visual Projector for Multimodal LLM", arXiv:2407.02392.
Knobs:
    scale: side of a region; published: 2, 3, 4.
    blocks: tower blocks whose output is read, by default those nearest to the shares of the depth at which CLIP-L's
        hidden states 12, 16, 22 and 23 (blocks 11, 15, 21 and 22 of 0..22) are.
    heads: of the attention, by default one per 128 of the tower's width.
    weights: the published checkpoint, or its tensors `model.mm_projector.…` alone.
Differs: the paper's injection adds the query to what it found; the official code does not, and neither do we.
Position: one each, as if the tower had given so many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import (
    PerFrameCompressor,
    Shapes,
    cells,
    divided,
    heads_of,
    layer_norm,
    linear,
    linear_shapes,
    mlp,
    multihead,
    multihead_shapes,
    norm_shapes,
    raster,
)
from graphs._contract import Signals, Site, block_of
from graphs._pool import bilinear, pool
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("tokenpacker", "tokenpacker:scale=4")
SWEEP = "tokenpacker"
BLOCKS, LAST = (11, 15, 21, 22), 22
EPS = 1e-6


@dataclass(frozen=True)
class TokenPacker(PerFrameCompressor):
    """TokenPacker's projector."""

    paper: ClassVar[str] = "Li et al. 2024, arXiv:2407.02392"

    scale: int = 2
    blocks: tuple[int, ...] | None = None
    heads: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", *dict.fromkeys(self.levels))

    @property
    def levels(self) -> tuple[str, ...]:
        """The signals whose vectors stand side by side; a shallow tower may give one of them twice."""
        return ("patches",) if self.blocks is None else tuple(f"patches@{block}" for block in self.blocks)

    def fitted(self, site: Site) -> TokenPacker:
        blocks = self.blocks or tuple(block_of(site, "patches", block / LAST) for block in BLOCKS)
        divided(site, self.scale, "scale")
        return replace(self, blocks=blocks, heads=heads_of(self.heads, site.dim, 128))

    def shape(self, site: Site) -> tuple[int, int]:
        return divided(site, self.scale, "scale")

    def trained(self, site: Site) -> Shapes:
        beside = len(self.levels) * site.patch_dim
        return {
            **linear_shapes("q_proj_1", site.dim, site.dim, bias=False),
            **linear_shapes("k_proj_1.0", beside, site.dim),
            **linear_shapes("k_proj_1.2", site.dim, site.dim),
            **linear_shapes("v_proj_1.0", beside, site.dim),
            **linear_shapes("v_proj_1.2", site.dim, site.dim),
            **norm_shapes("ln_q_1", site.dim),
            **norm_shapes("ln_k_1", site.dim),
            **norm_shapes("ln_v_1", site.dim),
            **multihead_shapes("clip_attn", site.dim),
            **linear_shapes("mlp.0", site.dim, site.llm_dim),
            **linear_shapes("mlp.2", site.llm_dim, site.llm_dim),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        assert self.heads is not None
        grid, coarse = raster(site), self.shape(site)
        levels = torch.cat([signals[name] for name in self.levels], -1)
        query = linear(signals, "q_proj_1", pool(bilinear(grid, coarse), signals["hidden"]))
        query = layer_norm(signals, "ln_q_1", query, EPS).flatten(0, 1).unsqueeze(1)
        key, value = (
            cells(layer_norm(signals, f"ln_{n}_1", mlp(signals, f"{n}_proj_1.0", f"{n}_proj_1.2", levels), EPS), grid, self.scale)
            for n in "kv"
        )  # fmt: skip
        found = multihead(signals, "clip_attn", query, key.flatten(0, 1), value.flatten(0, 1), self.heads)
        return mlp(signals, "mlp.0", "mlp.2", found.squeeze(1).unflatten(0, (-1, coarse[0] * coarse[1])))


METHOD = TokenPacker
