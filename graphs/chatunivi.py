"""Cluster the tokens at three scales, first within frames, then within events.

hidden [batch, frames, P, dim] → tokens [batch, keep, dim], event by event, fine to coarse; index int64 [batch, keep],
-1 for the coarser scales; size float32 [batch, keep].

1. In every frame, density peaks (`_cluster`) merge the P tokens into the first scale's number of clusters, these into
   the second's, these into the third's. A merged token is the plain mean of what it is made of.
2. An event is a run of frames. Its frames' tokens of one scale, side by side, merge once more, into that scale's
   number. So every event ends up with the sum of the scales, 112 as published.

Source: Jin et al. 2023, "Chat-UniVi: Unified Visual Representation Empowers Large Language Models with Image and Video
Understanding", CVPR 2024, arXiv:2311.08046.
Knobs:
    scales: clusters per scale, fine to coarse; the paper's 64+32+16 if nothing is given.
    keep / keep_ratio: tokens over the whole clip instead, split over three scales as 64 : 32 : 16.
    events: equal runs of frames, so it divides them; by default the possible number nearest to one per 16 frames. A
        single frame is an event, which is the paper's treatment of images. A keep or keep_ratio beyond the scales of
        so many events gets more.
    order: inside a scale, "paper": the strongest centre first; "raster": by centre.
Differs: events have equal length, where the paper clusters the frames, as their number must not depend on the data. Of
two tokens of equal density the earlier is the denser, where the official code adds noise. A scale with as many
clusters as there are tokens leaves them as they are. The layers between the scales do nothing in the official code and
are left out; its projector is trained with the clustering. `index`: a token of the finest scale is anchored at its
centre; coarser ones, which cover the same patches again, at none. Accumulated in float32, then cast back.
Position: *compact*: tokens of three scales have no common raster; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import spread, take
from graphs._clip import reachable, segments
from graphs._cluster import density_peaks
from graphs._contract import PerClip, Reduced, ReductionError, Signals, Site, Tier
from graphs._merge import mean, members
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("chatunivi", "chatunivi:keep_ratio=0.1,events=2", "chatunivi:scales=20+10,events=4,order=raster")

PAPER = (64, 32, 16)


@dataclass(frozen=True)
class ChatUniVi(PerClip):
    """Cluster tokens at three scales, in frames and then in events."""

    paper: ClassVar[str] = "Jin et al. 2023, arXiv:2311.08046"
    tier: ClassVar[Tier] = "trained"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    scales: tuple[int, ...] | None = None
    events: int | None = None
    order: Literal["paper", "raster"] = "paper"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> ChatUniVi:
        self.check()
        events, scales = segments(site, "events", self.events, site.frames / 16), self.scales
        if scales is None and self.keep is None and self.keep_ratio is None:
            scales = PAPER
        if scales is None:
            if site.total // events < 3:
                raise ReductionError(f"three scales take at least 3 tokens per event; found {site.total // events}")
            wanted = self.keep if self.keep_ratio is None else self.keep_ratio * site.total
            assert wanted is not None
            if self.events is None:
                events = _events(site, wanted)
            splits = {events * n: _split(n) for n in _sizes(site, events)}
            scales = splits[reachable(self.keep, self.keep_ratio, splits, site.total)]
        elif self.keep_ratio is not None or self.keep not in (None, events * sum(scales)):
            raise ReductionError(
                f"these `scales` keep {events * sum(scales)} tokens; leave out `keep` and `keep_ratio`"
            )
        if min(scales) < 1 or any(b > a for a, b in zip((site.tokens, *scales), scales, strict=False)):
            written = "+".join(map(str, scales))
            raise ReductionError(f"`scales` must not grow, from {site.tokens} tokens per frame to 1; found {written}")
        known = replace(self, scales=scales, events=events, keep=events * sum(scales), keep_ratio=None)
        return PerClip.fit(known, site)

    def forward(self, signals: Signals) -> Reduced:
        assert self.scales is not None and self.events is not None
        hidden = signals["hidden"]
        frames, patches = hidden.shape[1:3]
        length = frames // self.events
        index = spread(list(range(frames * patches)), hidden).unflatten(1, (frames, patches)).flatten(0, 1)
        frame = Reduced(hidden.flatten(0, 1).float(), index, torch.ones_like(index, dtype=torch.float32))
        out = []
        for i, count in enumerate(self.scales):
            frame = self._cluster(frame, count, 3 if i else 5)
            if i == 1:
                frame = frame._replace(index=torch.full_like(frame.index, -1))
            assert frame.size is not None
            event = Reduced(_join(frame.tokens, length), _join(frame.index, length), _join(frame.size, length))
            out.append(self._cluster(event, count, 3 if i else 5))
        tokens, index, size = (
            torch.cat(parts, 1).unflatten(0, (-1, self.events)).flatten(1, 2) for parts in zip(*out, strict=True)
        )
        return Reduced(tokens.to(hidden.dtype), index, size)

    def _cluster(self, x: Reduced, count: int, neighbours: int) -> Reduced:
        """Merge [batch, n, dim] into `count` clusters."""
        assert x.size is not None
        if x.tokens.shape[1] == count:
            return x
        if neighbours > count:
            neighbours = min(3, max(count // 2, 1))
        centres, owner = density_peaks(x.tokens, count, neighbours, raster=self.order == "raster")
        member = members(owner, count)
        tokens, _ = mean(member, x.tokens)
        return Reduced(tokens, take(x.index, centres), (member @ x.size.unsqueeze(-1)).squeeze(-1))


def _events(site: Site, wanted: float) -> int:
    """How many events, as near to one per 16 frames as `wanted` tokens allow."""
    possible = [n for n in range(1, site.frames + 1) if site.frames % n == 0 and _sizes(site, n)]
    order = sorted(possible, key=lambda n: abs(n - site.frames / 16))
    return min(order, key=lambda n: max(n * min(_sizes(site, n)) - wanted, wanted - n * max(_sizes(site, n)), 0))


def _sizes(site: Site, events: int) -> list[int]:
    """What three scales can sum up to in one event: the finest has at most a frame's tokens."""
    return [n for n in range(3, site.total // events + 1) if _split(n)[0] <= site.tokens]


def _split(n: int) -> tuple[int, int, int]:
    """n as three scales, near 4 : 2 : 1."""
    middle, coarse = (4 * n + 7) // 14, max(1, (2 * n + 7) // 14)
    return n - middle - coarse, middle, coarse


def _join(x: Tensor, length: int) -> Tensor:
    """[batch · length, n, ...] → [batch, length · n, ...]"""
    joined: Tensor = x.unflatten(0, (-1, length)).flatten(1, 2)
    return joined


METHOD = ChatUniVi
