"""Average what stands still over a segment of the clip, then cluster static and moving tokens apart.

hidden [batch, frames, P, dim] → tokens [batch, keep, dim], segment by segment: static tokens, then each frame's moving
ones; index int64 [batch, keep]; size float32 [batch, keep].

In every segment of consecutive frames:
1. The S places whose tokens are most alike over its frames (mean cosine of all pairs of frames) are *static*; of equal
   places the earlier. Their tokens are averaged over the segment.
2. Density peaks (`_cluster`, 7 neighbours) merge the static tokens, and those of the other places in every frame on
   its own, each into fewer. A merged token is the plain mean of its cluster.

This is the paper's part before the language model. Its second part prunes inside it.

Source: Huang et al. 2024, "PruneVid: Visual Token Pruning for Efficient Video Large Language Models",
arXiv:2412.16117.
Knobs:
    segments: equal ones of at least 2 frames, so it divides the frames; by default the possible number nearest to the
        paper's, a quarter of the frames.
    static_ratio: S / P, rounded down.
    keep / keep_ratio: tokens over the whole clip; they set how far both parts shrink, at equal ratios as nearly as it
        goes. If neither is given, each part is halved, as in the paper.
    order: "paper" as above, strongest centres first; "raster": all by anchor.
Differs: the paper clusters the frames into segments, calls a place static above a mean cosine of 0.8, and leaves parts
of up to 14 tokens alone. All three depend on the data, so segments are equal, S is a fixed part of the places, and
every part shrinks. Of two tokens of equal density the earlier is the denser, where the official code adds noise.
`index`: a static token is anchored in the segment's first frame. Accumulated in float32, then cast back.
Position: *compact*: the paper hands on the shorter sequence; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import ascending, complement, normalize, rank, select, snap, split, take
from graphs._clip import reachable, require_frames, segments
from graphs._cluster import density_peaks
from graphs._contract import PerClip, Reduced, ReductionError, Signals, Site, Tier
from graphs._merge import mean, members
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("prunevid", "prunevid:keep_ratio=0.25,static_ratio=0.7", "prunevid:keep=200,segments=4,order=raster")

NEIGHBOURS = 7


@dataclass(frozen=True)
class PruneVid(PerClip):
    """Average static places over a segment, then cluster."""

    paper: ClassVar[str] = "Huang et al. 2024, arXiv:2412.16117"
    tier: ClassVar[Tier] = "fixed budget"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    segments: int | None = None
    static_ratio: float = 0.5
    order: Literal["paper", "raster"] = "paper"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> PruneVid:
        self.check()
        require_frames(site)
        if not 0 <= self.static_ratio <= 1:
            raise ReductionError(f"`static_ratio` must be in 0..1; found {self.static_ratio:g}")
        cut = segments(site, "segments", self.segments, site.frames / 4)
        length = site.frames // cut
        if length < 2:
            raise ReductionError(
                f"a segment needs at least 2 frames, so `segments` is at most half of {site.frames}; found {cut}"
            )
        static = int(self.static_ratio * site.tokens)
        moving = site.tokens - static
        keep = self.keep
        if keep is None and self.keep_ratio is None:
            keep = cut * (max(min(1, static), static // 2) + length * max(min(1, moving), moving // 2))
        counts = {
            cut * (a + length * b) for a in range(min(1, static), static + 1) for b in range(min(1, moving), moving + 1)
        }
        keep = reachable(keep, self.keep_ratio, counts, site.total)
        return PerClip.fit(replace(self, segments=cut, keep=keep, keep_ratio=None), site)

    def forward(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.segments is not None
        hidden = signals["hidden"]
        frames, patches = hidden.shape[1:3]
        length, static = frames // self.segments, int(self.static_ratio * patches)
        still, moving = _split(self.keep // self.segments, static, patches - static, length)
        x = hidden.unflatten(1, (self.segments, length)).flatten(0, 1).float()  # [batch · segments, length, P, dim]
        together = normalize(x).sum(1)
        alike = snap((together.pow(2).sum(-1) - length) / (length * (length - 1)))
        parts = []
        if static:
            place = select(alike, static) if static < patches else torch.arange(patches).expand(x.shape[0], -1)
            parts.append(_clustered(take(x.mean(1), place), place, still, float(length)))
        if static < patches:
            place = complement(place, patches) if static else torch.arange(patches).expand(x.shape[0], -1)
            place = place.unsqueeze(1).expand(-1, length, -1).flatten(0, 1)
            out = _clustered(take(x.flatten(0, 1), place), place, moving, 1.0)
            assert out.size is not None
            index = split(out.index, length) + (torch.arange(length) * patches).unsqueeze(-1)
            tokens, size = split(out.tokens, length).flatten(1, 2), split(out.size, length).flatten(1)
            parts.append(Reduced(tokens, index.flatten(1), size))
        tokens, index, size = (split(torch.cat(xs, 1), self.segments) for xs in zip(*parts, strict=True))
        index = index + (torch.arange(self.segments) * length * patches).unsqueeze(-1)
        tokens, index, size = tokens.flatten(1, 2), index.flatten(1), size.flatten(1)
        if self.order == "raster":
            order = rank(index, self.keep, largest=False)
            tokens, index, size = take(tokens, order), ascending(index), take(size, order)
        return Reduced(tokens.to(hidden.dtype), index, size)


def _split(n: int, static: int, moving: int, length: int) -> tuple[int, int]:
    """Clusters of the static part and of every frame's moving part: n = a + length · b, at nearly equal ratios."""
    ratio = n / (static + length * moving)
    pairs = [(n - length * b, b) for b in range(min(1, moving), moving + 1)]
    pairs = [(a, b) for a, b in pairs if min(1, static) <= a <= static]
    return min(pairs, key=lambda pair: abs(pair[0] - ratio * static) + length * abs(pair[1] - ratio * moving))


def _clustered(x: Tensor, place: Tensor, count: int, weight: float) -> Reduced:
    """Merge [batch, n, dim], each standing for `weight` tokens, into `count` clusters; `place` names them."""
    if x.shape[1] == count:
        return Reduced(x, place, torch.full_like(place, weight, dtype=torch.float32))
    centres, owner = density_peaks(x, count, NEIGHBOURS, raster=False)
    tokens, size = mean(members(owner, count), x)
    return Reduced(tokens, take(place, centres), size * weight)


METHOD = PruneVid
