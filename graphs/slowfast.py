"""Few frames in detail, all frames coarsely: a slow path and a fast path, one after the other.

hidden [batch, frames, P, dim] on a grid of h × w → tokens [batch, keep, dim]; index int64 [batch, keep]; size float32
[batch, keep].

1. *Slow*: `slow_frames` evenly spaced frames (the i-th of s is frame ⌊i · frames / s⌋). Horizontal neighbours are
   max-pooled in pairs, channel by channel: h × w/2 tokens a frame.
2. *Fast*: every frame, adaptive average pooling to `fast` × `fast` tokens.
3. Out come all slow tokens, then all fast ones, each frame by frame in raster order.

Source: Xu et al. 2024, "A Strong Training-Free Baseline for Video Large Language Models" (its SlowFast design),
arXiv:2407.15841.
Knobs:
    slow_frames: frames of the slow path; by default a fifth of the clip (the paper's 10 of 50).
    fast: rows and columns of the fast path; by default a sixth of the grid's height (the paper's 4 of 24).
    rows: rows of the grid, by default the site's.
    keep / keep_ratio: tokens over the whole clip instead. First slow_frames comes as near as it can to its share in
        the paper, 18/23 (2880 of 3680 tokens), then fast fills up, unless one of them is given.
Differs: behind an odd grid width the last column is a pair of its own; the official code pools along the flattened
raster, where pairs would then straddle rows. The longer rotary range of the paper (factor 2) is a matter of the
language model. `index` is made unique: a slow token's anchor is the left one of its pair (an even column), a fast
token's is in an odd column of its cell, so `fast` is at most half the width.
Position: *compact*: the official code hands on the sequence; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._blocks import pick, spread
from graphs._clip import reachable, require_frames
from graphs._contract import PerClip, Reduced, ReductionError, Signals, Site, Space, Tier
from graphs._groups import rows_of
from graphs._pool import average, pool
from graphs._torch import torch

EXAMPLES = ("slowfast:slow_frames=2,fast=4", "slowfast:keep_ratio=0.3")

SLOW_SHARE = 18 / 23
"""The paper's: 2880 of 3680 tokens."""


@dataclass(frozen=True)
class SlowFast(PerClip):
    """Max-pool a few frames a little, average-pool all frames a lot."""

    paper: ClassVar[str] = "Xu et al. 2024, arXiv:2407.15841"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    slow_frames: int | None = None
    fast: int | None = None
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

    def fit(self, site: Site) -> SlowFast:
        self.check()
        require_frames(site)
        rows = rows_of(site, self.rows)
        columns = site.tokens // rows
        most = min(rows, columns // 2)
        if most < 1:
            raise ReductionError(f"it pools pairs of columns, so a row needs at least 2; found {columns}")
        slow = _options("slow_frames", self.slow_frames, site.frames)
        fast = _options("fast", self.fast, most)
        parts = {(s, f): (s * rows * -(-columns // 2), site.frames * f * f) for s in slow for f in fast}
        if self.keep is None and self.keep_ratio is None:
            found = (
                self.slow_frames or max(1, (2 * site.frames + 5) // 10),
                self.fast or min(most, max(1, (rows + 3) // 6)),
            )
        else:
            exact = reachable(self.keep, self.keep_ratio, [sum(p) for p in parts.values()], site.total)
            if self.keep is not None:
                parts = {pair: p for pair, p in parts.items() if sum(p) == exact}
            wanted = exact if self.keep_ratio is None else self.keep_ratio * site.total
            if self.fast is None:
                least = min(abs(slow - SLOW_SHARE * wanted) for slow, _ in parts.values())
                parts = {pair: p for pair, p in parts.items() if abs(p[0] - SLOW_SHARE * wanted) == least}
            found = min(parts, key=lambda pair: abs(sum(parts[pair]) - wanted))
        known = replace(self, slow_frames=found[0], fast=found[1], rows=rows, keep=sum(parts[found]), keep_ratio=None)
        return PerClip.fit(known, site)

    def forward(self, signals: Signals) -> Reduced:
        assert self.slow_frames is not None and self.fast is not None and self.rows is not None
        hidden = signals["hidden"]
        frames, patches = hidden.shape[1:3]
        height, width = self.rows, patches // self.rows
        chosen = [i * frames // self.slow_frames for i in range(self.slow_frames)]
        grid = pick(hidden, chosen).unflatten(2, (height, width))
        pairs = width // 2
        left, right = grid[:, :, :, : 2 * pairs : 2], grid[:, :, :, 1::2]
        slow = torch.cat([torch.maximum(left, right), grid[:, :, :, 2 * pairs :]], 3)
        fast = pool(average((height, width), (self.fast, self.fast)), hidden)
        tokens = torch.cat([slow.flatten(1, 3), fast.flatten(1, 2)], 1)

        down, across = _cells(height, self.fast), _cells(width, self.fast)
        odd = [(low + high) // 2 - 1 + (low + high) // 2 % 2 for low, high in across]
        anchors = [(low + high) // 2 * width + column for low, high in down for column in odd]
        index = [f * patches + r * width + c for f in chosen for r in range(height) for c in range(0, width, 2)]
        index += [f * patches + anchor for f in range(frames) for anchor in anchors]
        sizes = [min(2, width - c) for _ in chosen for _ in range(height) for c in range(0, width, 2)]
        sizes += frames * [
            _area(height, self.fast, i) * _area(width, self.fast, j) for i in range(self.fast) for j in range(self.fast)
        ]
        size = torch.tensor(sizes, dtype=torch.float32).expand(hidden.shape[0], -1)
        return Reduced(tokens, spread(index, hidden), size)


def _options(knob: str, given: int | None, most: int) -> list[int]:
    """The values a knob may take: what is given, or 1..most."""
    if given is None:
        return list(range(1, most + 1))
    if not 1 <= given <= most:
        raise ReductionError(f"`{knob}` must be in 1..{most} on this clip; found {given}")
    return [given]


def _cells(n: int, m: int) -> list[tuple[int, int]]:
    """The cells of adaptive pooling without their overlap: [start, next start)."""
    return [(i * n // m, (i + 1) * n // m) for i in range(m)]


def _area(n: int, m: int, i: int) -> int:
    """How many of n entries the i-th of m adaptive cells averages."""
    return -(-(i + 1) * n // m) - i * n // m


METHOD = SlowFast
