"""Average the tower's tokens to a square raster of fixed size, before the model's own projector: DeCo.

tokens [batch, frames · keep, dim], a smaller raster; index int64 [batch, frames · keep], the token at the middle of a cell,
the upper left of the nearest; size float32 [batch, frames · keep].

The raster is pooled adaptively to √keep × √keep: cells are spread evenly, and overlap where √keep does not divide a side. The
projector, Linear, GELU, Linear, is the checkpoint's own, trained on such tokens; on another model it is plain average
pooling.

Source: Yao et al. 2024, "DeCo: Decoupling Token Compression from Semantic Abstraction in Multimodal Large Language Models",
arXiv:2405.20985.
Knobs (per frame):
    keep: tokens that leave, a square number; by default the paper's 144. keep_ratio: the nearest square number, the smaller
        of equally near ones.
    raster: rows and columns of a frame, by default the site's.
Position: *compact*; on t/h/w grids *keep*, the position of the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphs._contract import Tier
from graphs._pool import Averaged, Grid

EXAMPLES = ("deco", "deco:keep=100", "deco:keep_ratio=0.2")


@dataclass(frozen=True)
class DeCo(Averaged):
    """Average to a square raster."""

    tier: ClassVar[Tier] = "trained"
    paper: ClassVar[str] = "Yao et al. 2024, arXiv:2405.20985"
    published: ClassVar[int | None] = 144

    def coarser(self, grid: Grid) -> Sequence[Grid]:
        return [(side, side) for side in range(1, min(grid) + 1)]


METHOD = DeCo
