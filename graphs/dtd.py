"""Drop what has not changed since the frame before, place by place.

hidden [batch, frames, P, dim] → tokens [batch, keep, dim] in raster order, frame by frame; index int64 [batch, keep].

1. The first frame stays whole.
2. A token of a later frame is compared with the token at its place in the *frame before*, whether that one stays or
   not: cosine.
3. The most similar tokens are dropped, as many as the budget asks for; of equal ones the earlier stay.

Source: Yao et al. 2025, "TimeChat-Online: 80% Visual Tokens are Naturally Redundant in Streaming Videos",
arXiv:2504.17343 (Differential Token Dropping).
Knobs:
    keep / keep_ratio: tokens over the whole clip; at least the first frame.
    budget: "frame", the published relative mode: every later frame loses as many, ⌊τ·P⌋ of its P tokens (`keep` is
        then P + (frames - 1) · (P - ⌊τ·P⌋)). "clip": one budget over all later frames, so that static frames shrink
        further and changing ones less: the static counterpart of the paper's absolute threshold.
Differs: the absolute mode (drop above a cosine of τ) has no fixed count; "clip" takes its place. Features are
compared, as in the official feature mode; its pixel mode would need the pixels. Equal similarities keep the earlier
token, where the official TopK leaves it open.
Position: *keep*: kept tokens keep their t/h/w or running ids, holes stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._blocks import normalize, select, snap, spread, take
from graphs._clip import reachable, require_frames
from graphs._contract import PerClip, Reduced, Signals, Site, Tier
from graphs._torch import torch

EXAMPLES = ("dtd:keep_ratio=0.3", "dtd:keep_ratio=0.3,budget=clip")


@dataclass(frozen=True)
class Dtd(PerClip):
    """Keep the first frame, and of later ones what changed most against the frame before."""

    paper: ClassVar[str] = "Yao et al. 2025, arXiv:2504.17343"
    tier: ClassVar[Tier] = "exact"

    budget: Literal["frame", "clip"] = "frame"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    def fit(self, site: Site) -> Dtd:
        self.check()
        require_frames(site)
        step = site.frames - 1 if self.budget == "frame" else 1
        counts = range(site.tokens, site.total + 1, step)
        keep = reachable(self.keep, self.keep_ratio, counts, site.total)
        return PerClip.fit(replace(self, keep=keep, keep_ratio=None), site)

    def forward(self, signals: Signals) -> Reduced:
        assert self.keep is not None
        hidden = signals["hidden"]
        frames, patches = hidden.shape[1:3]
        index = spread(list(range(patches)), hidden)
        if self.keep > patches:
            unit = normalize(hidden)
            change = -snap((unit[:, 1:] * unit[:, :-1]).sum(-1))
            groups = frames - 1 if self.budget == "frame" else 1
            change = change.flatten(1).unflatten(1, (groups, -1))
            chosen = select(change, (self.keep - patches) // groups)
            chosen = chosen + (torch.arange(groups) * change.shape[-1]).unsqueeze(-1)
            index = torch.cat([index, chosen.flatten(1) + patches], 1)
        return Reduced(take(hidden.flatten(1, 2), index), index)


METHOD = Dtd
