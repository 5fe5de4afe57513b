"""Project with LLaVA-STF: features of many tower blocks fused token by token, then every 2 × 2 tokens fused into one.

hidden [batch, frames, tokens, dim], patches@b [batch, frames, tokens, patch_dim] → tokens [batch, frames, tokens / 4, llm_dim].

1. A token's features and those of `blocks` stand side by side, the deepest block first.
2. Linear to half of that width, GELU, Linear to dim (multi-block token fusion).
3. The tokens of every cell of 2 × 2 become one vector: channel by channel, a channel's four values in raster order.
4. Linear to four times its width, GELU, Linear to the language model's width (spatial token fusion).

Source: Tang et al. 2025, "Learning Compact Vision Tokens for Efficient Large Multimodal Models", arXiv:2506.07138.
Knobs:
    blocks: tower blocks (0-based) beside the features. By default every third one counted back from the features, as published:
        20, 17, …, 2 where these are of block 22, the hidden states 21, 18, …, 3.
    weights: the published checkpoint, or its tensors `model.mm_projector…` alone.
Differs: nothing at 24 × 24 tokens. Other depths have fewer or more blocks and so other widths in step 2.
Position: one each, as if the tower had given so many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import PerFrameCompressor, Shapes, cells, halved, linear_shapes, mlp, raster
from graphs._contract import ReductionError, Signals, Site
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("llava_stf", "llava_stf:blocks=21+9")
SWEEP = "llava_stf"
STRIDE = 3
BLOCKS, CELLS = "mm_projector_crosslayer", "mm_projector"


@dataclass(frozen=True)
class LlavaStf(PerFrameCompressor):
    """LLaVA-STF's projector."""

    paper: ClassVar[str] = "Tang et al. 2025, arXiv:2506.07138"
    prefixes: ClassVar[tuple[str, ...]] = ("", "model.")

    blocks: tuple[int, ...] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", *(f"patches@{block}" for block in self.blocks or ()))

    def fitted(self, site: Site) -> LlavaStf:
        blocks = self.blocks or tuple(range(site.depth - STRIDE, 0, -STRIDE))
        if not blocks or len(set(blocks)) < len(blocks):
            raise ReductionError(f"`blocks` takes one or more different blocks of the tower; found {list(blocks)}")
        return replace(self, blocks=blocks)

    def shape(self, site: Site) -> tuple[int, int]:
        return halved(site)

    def trained(self, site: Site) -> Shapes:
        dim, joint = site.dim, site.dim + (len(self.needs) - 1) * site.patch_dim
        return {
            **linear_shapes(f"{BLOCKS}.0", joint, joint // 2),
            **linear_shapes(f"{BLOCKS}.2", joint // 2, dim),
            **linear_shapes(f"{CELLS}.0", 4 * dim, 16 * dim),
            **linear_shapes(f"{CELLS}.2", 16 * dim, site.llm_dim),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        joint = torch.cat([signals[name] for name in self.needs], -1)
        x = mlp(signals, f"{BLOCKS}.0", f"{BLOCKS}.2", joint)
        x = cells(x, raster(site), 2).transpose(2, 3).flatten(2)
        return mlp(signals, f"{CELLS}.0", f"{CELLS}.2", x)


METHOD = LlavaStf
