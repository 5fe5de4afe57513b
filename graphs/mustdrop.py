"""Merge the most uniform windows of neighbouring patches, in the first tower block.

hidden [batch, frames, tokens, dim], size [batch, frames, tokens] → tokens [batch, frames, kept, dim], CLS in front;
index int64 and size accordingly, of a merged window the place of its last patch.

Between attention and MLP of block 0:
1. The raster is cut into windows of 3 × 3 patches. A window's score is the mean cosine of all pairs of different
   patches in it.
2. The windows with the highest scores become one token each, the mean of their patches; the earlier among equals.
   What the count still asks for goes in the next best window, of which the last patches merge.
3. Out come CLS, the merged windows by descending score, then all other patches in raster order.

The tower does not count a merged token more than once in its attention.

Source: Liu et al. 2024, "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
arXiv:2411.10803: its first stage. The others, in the language model, are `mustdrop_l`.
Knobs:
    keep / keep_ratio: patches per frame that leave the tower (CLS not counted). At least one per window and those
        outside of any: 64 of 24 × 24.
    window: its side. rows: rows of the raster, by default the site's.
    order: "paper", or "raster": by index.
Differs: the paper merges the windows above a similarity of 0.8, as many as the image has (in a batch, the fewest of
any image); here `keep` says how many. It merges behind the MLP of block 0, here in front of it. Patches at the right
and lower border that fill no window stay alone, where the official code refuses such a raster. The mean is accumulated in
float32.
Position: *compact*, because merged tokens have no one place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._blocks import ascending, complement, normalize, pick, rank, snap, spread, take
from graphs._contract import PerFrameInTower, Reduced, ReductionError, Signals, Site, Tier, keep_count
from graphs._torch import torch
from graphs._tower import behind, in_order, pruned, with_cls

EXAMPLES = ("mustdrop:keep=144", "mustdrop:keep_ratio=0.6,order=raster", "mustdrop:keep=64,window=3,rows=24")


@dataclass(frozen=True)
class MustDrop(PerFrameInTower):
    """Merge windows of similar neighbours at the entrance of the tower."""

    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2411.10803"
    tier: ClassVar[Tier] = "fixed budget"

    keep: int | None = None
    keep_ratio: float | None = None
    window: int = 3
    rows: int | None = None
    order: Literal["paper", "raster"] = "paper"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    def fit(self, site: Site) -> MustDrop:
        self.check()
        self.require(site)
        rows = self.rows if self.rows is not None else site.grid[0] if site.grid else 0
        if rows < 1 or site.tokens % rows:
            raise ReductionError(f"`rows` must divide the {site.tokens} tokens of a frame; found {rows or 'no raster'}")
        if self.window < 2:
            raise ReductionError(f"`window` is the side of a square of patches, at least 2; found {self.window}")
        keep = keep_count(self.keep, self.keep_ratio, site.tokens)
        count = len(windows(rows, site.tokens // rows, self.window))
        smallest = site.tokens - count * (self.window**2 - 1)
        if keep < smallest:
            raise ReductionError(
                f"`keep` must be at least {smallest}, what {count} windows of {self.window} × {self.window} leave of "
                f"{site.tokens}; found {keep}"
            )
        return replace(self, keep=keep, keep_ratio=None, rows=rows, position=self.resolved_position())

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return behind(site, self.keep)

    @property
    def merges(self) -> bool:
        return True

    @property
    def proportional(self) -> bool:
        return False

    @property
    def blocks(self) -> tuple[int, ...]:
        return (0,)

    def reduce_frame(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        assert self.keep is not None and self.rows is not None
        hidden = signals["hidden"][:, cls_tokens:]
        n = hidden.shape[1]
        if self.keep == n:
            return pruned(signals, with_cls(spread(list(range(n)), hidden), cls_tokens))
        cut = windows(self.rows, n // self.rows, self.window)
        flat = [place for window in cut for place in window]
        inside = pick(hidden, flat).unflatten(1, (len(cut), -1)).float()  # [batch, windows, area, dim]
        area = inside.shape[2]
        unit = normalize(inside)
        pairs = unit.sum(2).pow(2).sum(-1) - unit.pow(2).sum((2, 3))
        full, rest = divmod(n - self.keep, area - 1)
        parts = [area] * full + ([rest + 1] if rest else [])  # how many of each chosen window merge, the last ones
        chosen = rank(snap(pairs / (area * (area - 1))), len(parts))
        places = take(spread(flat, hidden).unflatten(1, (len(cut), -1)), chosen)

        part = torch.tensor([[float(i >= area - m) for i in range(area)] for m in parts])
        count = part.sum(-1, keepdim=True)
        merged = (take(inside, chosen) * part.unsqueeze(-1)).sum(2) / count
        tokens, index, size = [merged.to(hidden.dtype)], [places[:, :, -1]], [count.T.expand(hidden.shape[0], -1)]
        if self.keep > len(parts):
            gone = [w * area + i for w, m in enumerate(parts) for i in range(area - m, area)]
            alone = complement(ascending(pick(places.flatten(1), gone)), n)
            tokens, index = [*tokens, take(hidden, alone)], [*index, alone]
            size = [*size, take(signals["size"][:, cls_tokens:], alone)]
        out = Reduced(torch.cat(tokens, 1), torch.cat(index, 1), torch.cat(size, 1))
        out = in_order(out) if self.order == "raster" else out
        assert out.size is not None
        front = signals["hidden"][:, :cls_tokens], signals["size"][:, :cls_tokens]
        return Reduced(
            torch.cat([front[0], out.tokens], 1), with_cls(out.index, cls_tokens), torch.cat([front[1], out.size], 1)
        )


def windows(rows: int, cols: int, side: int) -> list[list[int]]:
    """The places in every whole window, windows and places in raster order.

    >>> windows(2, 5, 2)
    [[0, 1, 5, 6], [2, 3, 7, 8]]
    """
    corners = [(y, x) for y in range(0, rows - side + 1, side) for x in range(0, cols - side + 1, side)]
    return [[(y + i) * cols + x + j for i in range(side) for j in range(side)] for y, x in corners]


METHOD = MustDrop
