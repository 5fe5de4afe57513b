"""Average the tokens at one of the scales that an M3 (Matryoshka) model was trained for, 24 × 24 down to a single token.

tokens [batch, frames · keep, dim], a smaller raster; index int64 [batch, frames · keep], the token at the middle of a cell,
the upper left of the nearest; size float32 [batch, frames · keep].

Behind the projector, the mean of every cell of k × k tokens. It has no weights of its own: the checkpoint's projector and
language model were trained for all scales at once. On another model it is plain average pooling.

Source: Cai et al. 2024, "Matryoshka Multimodal Models", arXiv:2405.17430.
Knobs (per frame):
    keep: what k = 1, 2, 4 or 8, or the whole raster as one cell, makes of it: 576, 144, 36, 9 and 1 of 24 × 24.
        keep_ratio: the nearest of these counts, the smaller of equally near ones.
    raster: rows and columns of a frame, by default the site's.
Differs: any raster that k divides, where the paper's is 24 × 24. It is `avgpool` with `space=llm`, kept to the trained scales.
Position: *compact*; on t/h/w grids *keep*, the position of the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphs._contract import Space, Tier
from graphs._pool import Averaged, Grid

EXAMPLES = ("m3:keep=36", "m3:keep_ratio=0.25")
KERNELS = (1, 2, 4, 8)


@dataclass(frozen=True)
class M3(Averaged):
    """Average at a trained scale."""

    tier: ClassVar[Tier] = "trained"
    paper: ClassVar[str] = "Cai et al. 2024, arXiv:2405.17430"

    @property
    def space(self) -> Space:
        return "llm"

    def coarser(self, grid: Grid) -> Sequence[Grid]:
        rows, cols = grid
        found = {(rows // k, cols // k) for k in KERNELS if rows % k == 0 and cols % k == 0}
        return sorted(found | {(1, 1)})


METHOD = M3
