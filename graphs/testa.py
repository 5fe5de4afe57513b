"""Merge similar frames of a clip and similar patches of a frame, in every tower block.

hidden [batch, frames, tokens, dim], keys [batch, frames, tokens, head_dim] (mean over heads), size
[batch, frames, tokens] → tokens [batch, frames - f, tokens - r, dim]; index int64 into all frames' tokens, one frame
after another, and size accordingly.

Between attention and MLP of block l:
1. *Frames*: those at even places form set A, those at odd places set B. Every patch of a frame in A looks for its
   most similar counterpart, the patch at its place in a frame of B (cosine of the keys); the frame that most patches
   look to is the partner, the earlier among equals. The f_l frames with the best match, the mean over patches, merge
   into their partners, place by place, CLS included. Out come the rest of A in ascending order, then B.
2. *Patches*: one round of bipartite matching in every frame merges r_l tokens: see `tome`. CLS takes no part. Keys of
   merged frames are means of keys.
Every merged token is a mean weighted by size.

The tower adds log(size) of a key to its attention logits in the following blocks.

Source: Ren et al. 2023, "TESTA: Temporal-Spatial Token Aggregation for Long-form Video-Language Understanding",
EMNLP 2023 Findings, arXiv:2310.19060.
Knobs:
    keep: patches per frame that leave the tower (CLS not counted). keep_ratio: the part of the clip's tokens that
        leaves it; then `keep` follows.
    keep_frames: frames that leave it. By default half of them, rounded up, or as many more as `keep_ratio` asks
        for: the paper halves 96 frames.
    frame_schedule, patch_schedule: the paper's (f, r), one number per tower block joined by + (then `keep_frames` and
        `keep` follow). By default spread evenly over the tower. A block can merge at most half; where later ones could
        not reach the count, earlier ones merge more.
    order: "paper", or "raster": every block's frames by time and patches by place, which changes who can match whom
        later.
Differs: the paper's tower has an attention over time before the one over space, and matches frames by its keys; here
both use the keys of the one attention there is. Of the patches' best similarities the official code takes the most
frequent value, which floats hardly have; here it is their mean. There all frames share one CLS, here each has its own.
Its checkpoints are fine-tuned with merging. Tokens and sizes are accumulated in float32.
Position: *compact*, because raster and time are lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._bipartite import Match, match, merge
from graphs._blocks import ascending, complement, first, normalize, one_hot, rank, snap, split, take
from graphs._contract import InTower, Reduced, ReductionError, Signals, Site, Tier, keep_count
from graphs._torch import torch
from graphs._tower import behind, checked, in_order, plan
from graphs.uniform import evenly

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = (
    "testa:keep=20",
    "testa:keep_ratio=0.25,order=raster",
    "testa:frame_schedule=1+0+0+1+0+0,patch_schedule=9+0+8+4+0+1",
)


@dataclass(frozen=True)
class TESTA(InTower):
    """Merge similar frames, and similar patches inside a frame."""

    paper: ClassVar[str] = "Ren et al. 2023, arXiv:2310.19060"
    tier: ClassVar[Tier] = "trained"

    keep: int | None = None
    keep_ratio: float | None = None
    keep_frames: int | None = None
    frame_schedule: tuple[int, ...] | None = None
    patch_schedule: tuple[int, ...] | None = None
    order: Literal["paper", "raster"] = "paper"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "keys")

    def fit(self, site: Site) -> TESTA:
        self.check()
        self.require(site)
        known = self._fit_frames(site)._fit_patches(site)
        return replace(known, keep_ratio=None, position=self.resolved_position())

    def _fit_frames(self, site: Site) -> TESTA:
        frames = site.frames
        if self.frame_schedule is not None:
            schedule = checked(self.frame_schedule, frames, site.depth, halves=True, knob="frame_schedule")
            left = frames - sum(schedule)
            if self.keep_frames not in (None, left):
                raise ReductionError(
                    f"this `frame_schedule` keeps {left} of {frames} frames; leave out `keep_frames` = {self.keep_frames}"
                )
            return replace(self, keep_frames=left, frame_schedule=schedule)
        left = -(-frames // 2) if self.keep_frames is None else self.keep_frames
        if self.keep_frames is None and self.keep_ratio is not None:
            left = min(frames, max(left, math.ceil(self.keep_ratio * frames)))
        if not 1 <= left <= frames:
            raise ReductionError(f"`keep_frames` must be in 1..{frames}, as there are {frames} frames; found {left}")
        where = evenly(site.depth, min(site.depth, frames - left))
        return replace(
            self,
            keep_frames=left,
            frame_schedule=plan(frames, left, where, site.depth, halves=True, what="keep_frames"),
        )

    def _fit_patches(self, site: Site) -> TESTA:
        assert self.keep_frames is not None
        tokens = site.tokens
        if self.patch_schedule is not None:
            schedule = checked(self.patch_schedule, tokens, site.depth, halves=True, knob="patch_schedule")
            keep = tokens - sum(schedule)
            if self.keep_ratio is not None or self.keep not in (None, keep):
                given = f"`keep` = {self.keep}" if self.keep_ratio is None else f"`keep_ratio` = {self.keep_ratio:g}"
                raise ReductionError(f"this `patch_schedule` keeps {keep} of {tokens} tokens; leave out {given}")
            return replace(self, keep=keep, patch_schedule=schedule)
        if self.keep is None and self.keep_ratio is not None:
            total = keep_count(None, self.keep_ratio, site.total)
            keep = max(1, math.floor(total / self.keep_frames + 0.5))
        else:
            keep = keep_count(self.keep, self.keep_ratio, tokens)
        if keep > tokens:
            raise ReductionError(
                f"`keep_ratio` = {self.keep_ratio:g} of {site.frames} frames is more than all of {self.keep_frames}; "
                "give a larger `keep_frames`"
            )
        return replace(self, keep=keep, patch_schedule=plan(tokens, keep, range(site.depth), site.depth, halves=True))

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return behind(site, self.keep, self.keep_frames)

    @property
    def merges(self) -> bool:
        return True

    @property
    def blocks(self) -> tuple[int, ...]:
        assert self.frame_schedule is not None and self.patch_schedule is not None
        both = zip(self.frame_schedule, self.patch_schedule, strict=True)
        return tuple(block for block, (f, r) in enumerate(both) if f or r)

    def forward(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        assert self.frame_schedule is not None and self.patch_schedule is not None
        hidden, size, keys = signals["hidden"], signals["size"], signals["keys"]
        frames, n = hidden.shape[1:3]
        f, r = self.frame_schedule[block], self.patch_schedule[block]
        index = torch.arange(frames * n).reshape(frames, n).expand(hidden.shape[0], -1, -1)
        if f:
            found = match_frames(keys[:, :, cls_tokens:], f)
            found = Match(*(t.unsqueeze(1).expand(-1, n, -1).flatten(0, 1) for t in found))  # at every place alike
            merged = self._ordered(merge(_by_place(hidden), _by_place(size), found))
            keys = _by_frame(self._ordered(merge(_by_place(keys), _by_place(size), found)).tokens, n)
            assert merged.size is not None
            hidden, size = _by_frame(merged.tokens, n), _by_frame(merged.size, n)
            index = _by_frame(merged.index, n) * n + torch.arange(n)
        if r:
            frames = hidden.shape[1]
            found = match(keys.flatten(0, 1), r, cls_tokens)
            merged = self._ordered(merge(hidden.flatten(0, 1), size.flatten(0, 1), found))
            assert merged.size is not None
            index = take(index.flatten(0, 1), merged.index).unflatten(0, (-1, frames))
            hidden, size = (x.unflatten(0, (-1, frames)) for x in (merged.tokens, merged.size))
        return Reduced(hidden, index, size)

    def _ordered(self, out: Reduced) -> Reduced:
        return in_order(out) if self.order == "raster" else out


def match_frames(keys: Tensor, f: int) -> Match:
    """The f even frames that match odd ones best, and the partner their patches vote for.

    Args:
        keys: [batch, frames, patches, dim].
    """
    unit = normalize(keys.transpose(1, 2))
    similarity = unit[:, :, ::2] @ unit[:, :, 1::2].transpose(-1, -2)  # [batch, patches, even, odd]
    even, odd = similarity.shape[2:]
    votes = one_hot(first(snap(similarity)), odd, torch.float32).sum(1)
    goes = ascending(rank(snap(similarity.amax(-1).mean(1)), f))
    return Match(complement(goes, even), goes, take(first(votes), goes))


def _by_place(x: Tensor) -> Tensor:
    """[batch, frames, places, ...] → [batch · places, frames, ...]"""
    return x.transpose(1, 2).flatten(0, 1)


def _by_frame(x: Tensor, places: int) -> Tensor:
    """[batch · places, frames, ...] → [batch, frames, places, ...]"""
    return split(x, places).transpose(1, 2)


METHOD = TESTA
