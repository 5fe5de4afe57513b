"""Merge connected components of similar tokens, within frames and then over the clip.

tokens [batch, keep, dim], by frame and raster of their anchors; index int64 [batch, keep], a component's token with the
most neighbours; size float32 [batch, keep].

1. *Graph* of a frame: two tokens are neighbours if their cosine is above `tau`.
2. *Components*: tokens joined by a path become their mean. Its anchor is the token with the most neighbours, the earlier
   among equals. The `per_frame` largest components of each frame stay.
3. The same over the components of all frames; the `keep` largest, counted in tokens, stay.
4. Every token that came in joins the component it resembles most (cosine, the earlier among equals), whether it was a
   part of it or not. Out comes (component + sum of those that joined) / (1 + their number); `size` is that number, at
   least 1.

Where there are fewer components than are to stay, the earliest other tokens fill up, each as it is.

Source: Sun et al. 2025, "Token Compression with Semantic Connected Components for Video LLMs" (Scissor),
arXiv:2506.21862.
Knobs:
    keep / keep_ratio: tokens over all frames that leave.
    tau: cosine above which two tokens count as alike.
    per_frame: components of a frame that reach the clip stage; by default twice its share of `keep`, and just `keep`
        for a single image, which needs no second stage.
Differs: in the paper tau alone sets the rate, here the count is fixed, and `tau` only says which tokens belong together.
Components are found exactly (by repeated squaring of the neighbour matrix), where the official code looks at a random
sample of 1 / 0.05² · log n tokens; that is all of them below some 3400. Merging is accumulated in float32, then cast
back.
Position: *compact*: the language model gets a shorter sequence; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from graphs._blocks import SNAP, first, normalize, select, snap, split, spread, take
from graphs._contract import PerClip, Reduced, ReductionError, Signals, Site, Space, Tier
from graphs._merge import members
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("scissor:keep=144", "scissor:keep_ratio=0.05,tau=0.8,per_frame=12", "scissor:keep=7,per_frame=5")


@dataclass(frozen=True)
class Scissor(PerClip):
    """Merge connected components of similar tokens."""

    tier: ClassVar[Tier] = "fixed budget"
    paper: ClassVar[str] = "Sun et al. 2025, arXiv:2506.21862"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    tau: float = 0.95
    per_frame: int | None = None

    @property
    def space(self) -> Space:
        return "llm"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> Scissor:
        known = PerClip.fit(self, site)
        assert known.keep is not None
        if not -1 <= known.tau < 1:
            raise ReductionError(f"`tau` is a cosine, in [-1, 1); found {known.tau:g}")
        share = -(-known.keep // site.frames)
        most = site.tokens if site.frames > 1 else share
        per_frame = min(2 * share, most) if known.per_frame is None else known.per_frame
        if not share <= per_frame <= most:
            raise ReductionError(
                f"`per_frame` must be in {share}..{most}, as {site.frames} frames of {site.tokens} tokens are to leave "
                f"{known.keep}; found {per_frame}"
            )
        return replace(known, per_frame=per_frame)

    def forward(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.per_frame is not None
        hidden = signals["hidden"]
        frames, n = hidden.shape[1:3]
        x = hidden.flatten(0, 1).float()
        found = components(x, torch.ones_like(x[..., 0]), self.tau, self.per_frame)
        x, centre, anchor = hidden.flatten(1, 2).float(), found.mean, found.anchor
        if frames > 1:
            anchor = (split(anchor, frames) + torch.arange(frames).unsqueeze(-1) * n).flatten(1)
            centre = split(centre, frames).flatten(1, 2)
            found = components(centre, split(found.weight, frames).flatten(1), self.tau, self.keep)
            anchor, centre = take(anchor, found.anchor), found.mean
        nearest = first(snap(normalize(x) @ normalize(centre).transpose(1, 2)))
        joined = members(nearest, self.keep)
        count = joined.sum(-1)
        tokens = (centre + joined @ x) / (1 + count).unsqueeze(-1)
        return Reduced(tokens.to(hidden.dtype), anchor, count.clamp(min=1))


class Components(NamedTuple):
    """mean float32 [batch, k, dim], anchor int64 [batch, k] (ascending), weight float32 [batch, k]; weight 0: no
    component but a token that fills up."""

    mean: Tensor
    anchor: Tensor
    weight: Tensor


def components(x: Tensor, weight: Tensor, tau: float, k: int) -> Components:
    """The k heaviest connected components of the graph cos > tau.

    Args:
        x: float32 [batch, n, dim]. weight: float32 [batch, n]; tokens of weight 0 have no neighbours and no component.
    """
    n = x.shape[1]
    unit, real = normalize(x), weight > 0
    alike = (snap(unit @ unit.transpose(1, 2)) > tau * SNAP) & real.unsqueeze(-1) & real.unsqueeze(-2)
    linked = (alike | torch.eye(n, dtype=torch.bool)).to(torch.float32)
    degree = linked.sum(-1)
    for _ in range((n - 1).bit_length()):  # paths of up to 2, 4, 8 … edges
        linked = (linked @ linked).clamp(max=1)
    place = torch.arange(n)
    one, other = degree.unsqueeze(-1), degree.unsqueeze(-2)
    ahead = (other > one) | ((other == one) & (place[None, :] < place[:, None]))
    head = (linked * ahead.to(torch.float32)).sum(-1) == 0  # nobody in its component has more neighbours
    total = torch.where(head & real, (linked @ weight.unsqueeze(-1)).squeeze(-1), 0.0)
    anchor = select(total, k) if k < n else spread(list(range(n)), x)
    total = take(total, anchor)
    part = take(linked, anchor)
    mean = (part @ x) / part.sum(-1, keepdim=True)
    return Components(torch.where(total.unsqueeze(-1) > 0, mean, take(x, anchor)), anchor, total)


METHOD = Scissor
