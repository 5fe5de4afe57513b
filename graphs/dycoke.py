"""In groups of four frames, keep of the second, third and fourth only what differs from an earlier one.

hidden [batch, frames, P, dim] → tokens [batch, keep, dim], frame by frame; index int64 [batch, keep].

In the language model's space, frames counted from 1 in every group of four:
1. Frame 2 is compared with frame 1, frame 4 with frame 3, token by token at the same place: cosine. Both keep the c
   tokens least similar; the others are dropped.
2. Frame 3 is compared with frame 1 in the same way. (Frame 4 was compared with frame 3 as it was before.)
3. Frame 1 stays whole. Of equal tokens the earlier stay.

This is the first of the paper's two stages, temporal merging. The second acts on the cache while decoding.

Source: Tao et al. 2024, "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
arXiv:2411.15024.
Knobs:
    keep / keep_ratio: tokens over the whole clip; they set c, the tokens that a thinned frame keeps. If neither is
        given, the paper's c = ⌊(1 - k) · P⌋ with k = 0.7: 32 frames of 196 tokens become 3098.
    last: "paper": the last group's third frame stays whole, as the official loop stops before it; "repair": it is
        thinned as well.
    order: of the tokens kept of a thinned frame, "raster" or "paper" (least similar first, as the official code leaves
        them).
Differs: as in the official code, and against the paper's name for it, similar tokens are dropped, not merged. The
raster is restored unless asked otherwise, as its loss is an accident of the code. Of an odd number of frames the last
one stays whole, where the official code loses it.
Position: *compact*: the official code hands on the shorter sequence; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._blocks import ascending, normalize, pick, rank, snap, spread, take
from graphs._clip import reachable, require_frames
from graphs._contract import PerClip, Reduced, Signals, Site, Space, Tier
from graphs._torch import torch

EXAMPLES = ("dycoke", "dycoke:keep_ratio=0.6,last=repair", "dycoke:keep_ratio=0.5,order=paper")


@dataclass(frozen=True)
class DyCoke(PerClip):
    """Thin out three of four frames by their similarity to an earlier one."""

    paper: ClassVar[str] = "Tao et al. 2024, arXiv:2411.15024"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    last: Literal["paper", "repair"] = "paper"
    order: Literal["paper", "raster"] = "raster"

    @property
    def space(self) -> Space:
        return "llm"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    def fit(self, site: Site) -> DyCoke:
        self.check()
        require_frames(site)
        thinned = len(self._references(site.frames))
        whole = (site.frames - thinned) * site.tokens
        keep = self.keep
        if keep is None and self.keep_ratio is None:
            keep = whole + thinned * (site.tokens * 3 // 10)
        counts = range(whole, site.total + 1, thinned)
        keep = reachable(keep, self.keep_ratio, counts, site.total)
        return PerClip.fit(replace(self, keep=keep, keep_ratio=None), site)

    def _references(self, frames: int) -> dict[int, int]:
        """Thinned frame → the frame it is compared with, ascending."""
        pairs = {i + 1: i for i in range(0, frames - 1, 2)}
        thirds = {i + 2: i for i in range(0, frames - (4 if self.last == "paper" else 2), 4)}
        return dict(sorted((pairs | thirds).items()))

    def forward(self, signals: Signals) -> Reduced:
        assert self.keep is not None
        hidden = signals["hidden"]
        frames, patches = hidden.shape[1:3]
        reference = self._references(frames)
        stay = (self.keep - (frames - len(reference)) * patches) // len(reference)
        parts = {f: spread(list(range(patches)), hidden) for f in range(frames) if f not in reference}
        if stay:
            unit = normalize(hidden)
            near = snap((pick(unit, list(reference)) * pick(unit, list(reference.values()))).sum(-1))
            place = rank(near, stay, largest=False)
            place = place if self.order == "paper" else ascending(place)
            parts |= {f: place[:, i] for i, f in enumerate(reference)}
        index = torch.cat([parts[f] + f * patches for f in sorted(parts)], 1)
        return Reduced(take(hidden.flatten(1, 2), index), index)


METHOD = DyCoke
