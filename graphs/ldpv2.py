"""Project with MobileVLM V2's LDPv2: an MLP, the mean of every 2 × 2 tokens, and a convolution that tells positions.

hidden [batch, frames, tokens, dim] → tokens [batch, frames, tokens / 4, llm_dim].

1. Linear, GELU, Linear to the language model's width.
2. The mean of every cell of 2 × 2 tokens.
3. A depthwise 3 × 3 convolution is added (PEG).

Source: Chu et al. 2024, "MobileVLM V2: Faster and Stronger Baseline for Vision Language Model", arXiv:2402.03766.
Knobs:
    weights: the published checkpoint, or its tensors `model.mm_projector.…` alone.
Differs: the official code pools adaptively to 12 × 12, which is 2 × 2 for its tower of 24 × 24; here cells are always 2 × 2.
Position: one each, as if the tower had given so many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import (
    PerFrameCompressor,
    Shapes,
    cells,
    conv,
    conv_shapes,
    halved,
    linear_shapes,
    mlp,
    raster,
    to_planes,
    to_tokens,
)
from graphs._contract import Signals, Site

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("ldpv2",)
SWEEP = "ldpv2"
FIRST, SECOND, PEG = "mlp.mlp.0", "mlp.mlp.2", "peg.peg.0"


@dataclass(frozen=True)
class LdpV2(PerFrameCompressor):
    """MobileVLM V2's projector."""

    paper: ClassVar[str] = "Chu et al. 2024, arXiv:2402.03766"

    def shape(self, site: Site) -> tuple[int, int]:
        return halved(site)

    def trained(self, site: Site) -> Shapes:
        return {
            **linear_shapes(FIRST, site.dim, site.llm_dim),
            **linear_shapes(SECOND, site.llm_dim, site.llm_dim),
            **conv_shapes(PEG, site.llm_dim, site.llm_dim, (3, 3), groups=site.llm_dim),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        x = mlp(signals, FIRST, SECOND, signals["hidden"])
        planes = to_planes(cells(x, raster(site), 2).mean(2), self.shape(site))
        return to_tokens(planes + conv(signals, PEG, planes, padding=1, groups=site.llm_dim))


METHOD = LdpV2
