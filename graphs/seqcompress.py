"""Cluster the projected tokens by k-means and pass on the means.

tokens [batch, frames · keep, dim], index int64 [batch, frames · keep]: cluster by cluster in the order of the tokens
their centres start from, which is raster order; `index` names those. size float32 [batch, frames · keep].

1. The first centres are `keep` tokens on an evenly spaced grid.
2. `steps` times (Lloyd): every token joins the centre at the least Euclidean distance, of equals the first; each centre
   becomes the mean of its tokens. A centre nobody joins stays as it is, with size 1.
3. Out come the centres, with the sizes of the last step.

Source: Omri, Shroff and Tambe 2025, "Token Sequence Compression for Efficient Multimodal Computing",
arXiv:2504.17892.
Knobs (per frame):
    keep / keep_ratio: K, the clusters.
    steps: Lloyd steps.
    rows: rows of the grid the first centres lie on, by default the site's; 1 is the plain raster.
Differs: the paper draws first centres at random (k-means++) and iterates to convergence; here everything is fixed, so
the same image always gives the same tokens. Distances within 1/4096 of the mean squared length are equal. Merging is
accumulated in float32, then cast back.
Position: *compact*, as a cluster has no place; *keep* on t/h/w grids: even spacing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._blocks import TINY, first, pick, snap, spread
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Space, Tier
from graphs._groups import rows_of
from graphs._merge import mean, members
from graphs._torch import torch
from graphs.uniform import grid

EXAMPLES = ("seqcompress:keep=64", "seqcompress:keep_ratio=0.25,steps=2,rows=1")


@dataclass(frozen=True)
class SeqCompress(PerFrame):
    """Cluster tokens by k-means and keep the means."""

    tier: ClassVar[Tier] = "fixed budget"
    paper: ClassVar[str] = "Omri et al. 2025, arXiv:2504.17892"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    steps: int = 5
    rows: int | None = None

    @property
    def space(self) -> Space:
        return "llm"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> SeqCompress:
        self.check()
        if self.steps < 1:
            raise ReductionError(f"`steps` must be at least 1; found {self.steps}")
        rows = 1 if self.rows is None and site.grid is None else rows_of(site, self.rows)
        return PerFrame.fit(replace(self, rows=rows), site)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.rows is not None
        hidden = signals["hidden"]
        n = hidden.shape[1]
        start = grid(self.rows, n // self.rows, self.keep)
        x = hidden.float()
        centre, size = pick(x, start), torch.ones_like(x[:, : self.keep, 0])
        scale = x.pow(2).sum(-1).mean(-1)[:, None, None] + TINY
        for _ in range(self.steps):
            # ‖x - c‖² is least where 2 x·c - ‖c‖² is largest.
            near = 2 * (x @ centre.transpose(1, 2)) - centre.pow(2).sum(-1).unsqueeze(-2)
            updated, size = mean(members(first(snap(near, scale)), self.keep), x)
            centre = torch.where(size.unsqueeze(-1) > 0, updated, centre)
        return Reduced(centre.to(hidden.dtype), spread(start, hidden), size.clamp(min=1))


METHOD = SeqCompress
