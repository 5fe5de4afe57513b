"""Project with InternVL's pixel shuffle: every 2 × 2 tokens side by side in one, then a norm and an MLP.

hidden [batch, frames, tokens, dim] → tokens [batch, frames, tokens / 4, llm_dim].

1. The four tokens of every 2 × 2 cell, row by row, become one of 4 dim.
2. Layer norm, Linear, GELU, Linear.

Source: Chen et al. 2024, "How Far Are We to GPT-4V? Closing the Gap to Commercial Multimodal Models with Open-Source Suites"
(InternVL 1.5), arXiv:2404.16821.
Knobs:
    version: `ps_version` of the checkpoint's config.json. "v1" forgets to swap the axes back, so that the tokens leave
        column by column.
    weights: the published checkpoint, or its tensors `mlp1.…` alone.
Position: one each, as if the tower had given so many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._compressor import (
    PerFrameCompressor,
    Shapes,
    cells,
    halved,
    layer_norm,
    linear_shapes,
    mlp,
    norm_shapes,
    raster,
)
from graphs._contract import Signals, Site

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("pixelshuffle", "pixelshuffle:version=v1")
SWEEP = "pixelshuffle"
NORM, FIRST, SECOND = "mlp1.0", "mlp1.1", "mlp1.3"


@dataclass(frozen=True)
class PixelShuffle(PerFrameCompressor):
    """InternVL's projector."""

    paper: ClassVar[str] = "Chen et al. 2024, arXiv:2404.16821"
    prefixes: ClassVar[tuple[str, ...]] = ("",)

    version: Literal["v1", "v2"] = "v2"

    def shape(self, site: Site) -> tuple[int, int]:
        rows, cols = halved(site)
        return (cols, rows) if self.version == "v1" else (rows, cols)

    def trained(self, site: Site) -> Shapes:
        return {
            **norm_shapes(NORM, 4 * site.dim),
            **linear_shapes(FIRST, 4 * site.dim, site.llm_dim),
            **linear_shapes(SECOND, site.llm_dim, site.llm_dim),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        x = cells(signals["hidden"], raster(site), 2).flatten(2)
        if self.version == "v1":
            x = x.unflatten(1, halved(site)).transpose(1, 2).flatten(1, 2)
        return mlp(signals, FIRST, SECOND, layer_norm(signals, NORM, x))


METHOD = PixelShuffle
