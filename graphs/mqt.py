"""Project with MQT's nested queries, of which any first few can be used: one checkpoint, any number of tokens.

hidden [batch, frames, tokens, dim] → tokens [batch, frames, keep, llm_dim].

1. One multi-head attention: queries LN(query + position), the first `keep` of 256; keys LN(position), the grid of
   16 × 16 positions resized to the raster of tokens (bicubic); values LN(hidden).
2. A matrix to the language model's width.

Keys do not see the image, so the attention is the same for all images: a part of the graph without inputs, which runtimes fold
into one matrix per head.

Source: Hu et al. 2024, "Matryoshka Query Transformer for Large Vision-Language Models", arXiv:2405.19315.
Knobs:
    keep / keep_ratio: tokens that leave a frame, by default all 256 that were trained.
    heads: of the attention, by default one per 64 of the tower's width.
    weights: the published checkpoint, or its tensors `model.mm_projector.…` alone.
Position: one each, as if the tower had given so many; the tokens lie in no raster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import (
    PerFrameCompressor,
    Shapes,
    heads_of,
    layer_norm,
    multihead,
    multihead_shapes,
    norm_shapes,
    raster,
)
from graphs._contract import ReductionError, Signals, Site, keep_count
from graphs._pool import bicubic, pool

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("mqt:keep=36", "mqt:keep_ratio=0.25")
SWEEP = "mqt:keep=16"
SIDE = 16
EPS = 1e-6


@dataclass(frozen=True)
class Mqt(PerFrameCompressor):
    """MQT's projector."""

    paper: ClassVar[str] = "Hu et al. 2024, arXiv:2405.19315"

    keep: int | None = None
    keep_ratio: float | None = None
    heads: int | None = None

    def fitted(self, site: Site) -> Mqt:
        keep = SIDE**2
        if self.keep is not None or self.keep_ratio is not None:
            keep = keep_count(self.keep, self.keep_ratio, site.tokens)
        if keep > SIDE**2:
            raise ReductionError(f"`keep` must be in 1..{SIDE**2}, as so many queries were trained; found {keep}")
        raster(site)
        return replace(self, keep=keep, keep_ratio=None, heads=heads_of(self.heads, site.dim, 64))

    def shape(self, site: Site) -> int:
        assert self.keep is not None
        return self.keep

    def trained(self, site: Site) -> Shapes:
        return {
            "query": (SIDE**2, site.dim),
            "pos_embed": (SIDE**2, site.dim),
            **multihead_shapes("attn", site.dim),
            **norm_shapes("ln_q", site.dim),
            **norm_shapes("ln_k", site.dim),
            **norm_shapes("ln_v", site.dim),
            "proj": (site.dim, site.llm_dim),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        assert self.heads is not None
        at = signals["pos_embed"]
        query = layer_norm(signals, "ln_q", (signals["query"] + at)[: self.keep], EPS)
        key = layer_norm(signals, "ln_k", pool(bicubic((SIDE, SIDE), raster(site)), at), EPS)
        value = layer_norm(signals, "ln_v", signals["hidden"], EPS)
        return multihead(signals, "attn", query.unsqueeze(0), key.unsqueeze(0), value, self.heads) @ signals["proj"]


METHOD = Mqt
