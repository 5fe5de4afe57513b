"""Project with HiRes-LLaVA's self-mining sampler: the mean of every cell of tokens attends to the tokens of that cell.

hidden [batch, frames, tokens, dim] → tokens [batch, frames, tokens / side², llm_dim].

1. A query is the mean of a cell of side × side tokens.
2. It attends, with several heads, to the tokens of its cell and to itself; layer norms before (one for tokens, one for the
   query, as query and as key), no residual behind.
3. Linear, GELU, Linear to the language model's width.

Source: Huang et al. 2024, "HiRes-LLaVA: Restoring Fragmentation Input in High-Resolution Large Vision-Language Models",
arXiv:2407.08706; in detail as in EMOVA, arXiv:2409.18042, whose authors name this paper for it.
Knobs:
    side: of a cell.
    heads: of the attention, by default one per 64 of the tower's width.
    weights: a checkpoint of EMOVA's `SelfMiningMMProjector`, or its tensors `model.mm_projector.…` alone.
Differs: the paper has no code of its own. Its other half, the SliceRestore adapter, is inside the tower's layers and no part
of this: a checkpoint that has it needs a tower that has it.
Position: one each, as if the tower had given so many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import (
    PerFrameCompressor,
    Shapes,
    attention,
    cells,
    divided,
    heads_of,
    layer_norm,
    linear,
    linear_shapes,
    mlp,
    norm_shapes,
    raster,
)
from graphs._contract import Signals, Site
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("hires", "hires:heads=2")
SWEEP = "hires"
SAMPLER = "downsampler"


@dataclass(frozen=True)
class HiRes(PerFrameCompressor):
    """HiRes-LLaVA's sampler and projector."""

    paper: ClassVar[str] = "Huang et al. 2024, arXiv:2407.08706"

    side: int = 2
    heads: int | None = None

    def fitted(self, site: Site) -> HiRes:
        return replace(self, heads=heads_of(self.heads, site.dim, 64))

    def shape(self, site: Site) -> tuple[int, int]:
        return divided(site, self.side, "side")

    def trained(self, site: Site) -> Shapes:
        return {
            **norm_shapes(f"{SAMPLER}.norm_media", site.dim),
            **norm_shapes(f"{SAMPLER}.norm_context", site.dim),
            **linear_shapes(f"{SAMPLER}.to_q", site.dim, site.dim, bias=False),
            **linear_shapes(f"{SAMPLER}.to_kv", site.dim, 2 * site.dim, bias=False),
            **linear_shapes("mlp.0", site.dim, site.llm_dim),
            **linear_shapes("mlp.2", site.llm_dim, site.llm_dim),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        assert self.heads is not None
        tokens = cells(signals["hidden"], raster(site), self.side)
        query = layer_norm(signals, f"{SAMPLER}.norm_media", tokens.mean(2, keepdim=True)).flatten(0, 1)
        seen = torch.cat([layer_norm(signals, f"{SAMPLER}.norm_context", tokens).flatten(0, 1), query], 1)
        key, value = linear(signals, f"{SAMPLER}.to_kv", seen).chunk(2, -1)
        found = attention(linear(signals, f"{SAMPLER}.to_q", query), key, value, self.heads)
        return mlp(signals, "mlp.0", "mlp.2", found.squeeze(1).unflatten(0, (-1, tokens.shape[1])))


METHOD = HiRes
