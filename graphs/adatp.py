"""Prune a clip inside the LLM by attention freed of its bias to the clip's ends and to the same places in all frames.

hidden [batch, tokens, dim], attention_row [batch, tokens], embeds [batch, tokens, dim], text_embeds [batch, text, dim],
instruction_mask [batch, text] → tokens [batch, keep, dim] in raster order, frame by frame; index int64 [batch, keep].

1. *Segments*: a frame's feature is the mean of its visual tokens as they enter the language model. The `segments` - 1
   frames that resemble the one before least (cosine) begin a new segment; of equal ones the earlier.
2. *Global debias*: a frame's relevance is the cosine of its feature to the mean of the text behind the image, scaled
   linearly so that the clip's frames span 0 to 1. A segment's share of `keep` is the sum of 1 + strength · relevance
   over its frames; whole numbers by largest remainder.
3. *Local debias*: a token's score is the last prompt token's attention to it in the layer before `layer`. In a segment,
   those tokens come first that have the highest score at their place over the segment's frames (the earlier among
   equals), then those with the second highest, and so on; within these by score.
4. The first tokens of every segment fill its share. A share greater than its segment goes to the best of the others.

A single image is one segment: there it is `fastv`.

Source: Sun et al. 2025, "AdaTP: Attention-Debiased Token Pruning for Video Large Language Models", EMNLP 2025 Findings,
arXiv:2505.20100.
Knobs:
    layer: before which tokens are dropped, 0-based. By default 2 of 32, at the same part of the depth.
    keep: visual tokens left, over the clip. keep_ratio: 0.25 if neither is given, near the paper's 27.3 % of FLOPs.
    segments: in 1..frames; by default a quarter of the frames, rounded half up, at least one.
    strength: how much more budget a frame gets for its relevance; 0: all frames alike.
    rope: off scores without position.
    frames: of the clip, all with the same raster; by default the site's.
Differs: no code was published, and this follows accounts of the paper. It cuts where the similarity of neighbouring
frames falls below a threshold, so that the clip sets the number of segments; it asks an external text encoder for the
relevance, where the model's own embeddings stand in, and so does the mean token for the encoder's global one; it prunes
step by step over several layers, where we prune once: behind the first step frames would have unequal counts. How
relevance becomes a budget, and the defaults, are ours.
Position: *keep*: kept tokens keep their ids, holes stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._blocks import force, normalize, one_hot, placement, rank, select, snap, take
from graphs._contract import Reduced, ReductionError, Signals, Site, Tier
from graphs._layers import AtLayer
from graphs._quota import quotas
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("adatp", "adatp:keep=30,layer=3,segments=2", "adatp:keep_ratio=0.5,strength=3,rope=off,frames=1")


@dataclass(frozen=True)
class AdaTP(AtLayer):
    """Keep tokens by attention, with a budget for every segment and no place twice before all have had their turn."""

    paper: ClassVar[str] = "Sun et al. 2025, arXiv:2505.20100"
    tier: ClassVar[Tier] = "fixed budget"
    paper_layer: ClassVar[int] = 2
    paper_ratio: ClassVar[float] = 0.25

    segments: int | None = None
    strength: float = 1.0
    rope: bool = True
    frames: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("attention_row" if self.rope else "plain_row", "embeds", "text_embeds", "instruction_mask")

    def fit(self, site: Site) -> AdaTP:
        known = AtLayer.fit(self, site)
        if self.strength < 0:
            raise ReductionError(f"`strength` is at least 0; found {self.strength:g}")
        frames = self.frames
        if frames is None:
            if site.frames > 1 and site.grid is None:
                raise ReductionError(
                    "it compares places over frames, but the raster of the tokens is lost here; give `frames` if every "
                    "frame still has the same places"
                )
            frames = site.frames
        if frames < 1 or site.total % frames:
            raise ReductionError(f"`frames` must divide the {site.total} tokens of the clip; found {frames}")
        segments = max(1, (frames + 2) // 4) if self.segments is None else self.segments
        if not 1 <= segments <= frames:
            raise ReductionError(f"`segments` must be in 1..{frames}, as there are {frames} frames; found {segments}")
        return replace(known, segments=segments, frames=frames)

    def forward(self, layer: int, signals: Signals) -> Reduced:
        assert self.keep is not None and self.frames is not None
        hidden, row = signals["hidden"], signals[self.needs[0]]
        n, patches = hidden.shape[1], hidden.shape[1] // self.frames
        frame = normalize(signals["embeds"].unflatten(1, (self.frames, patches)).float().mean(2))
        segment = self._segment(frame)  # [batch, frames]
        quota = self._quota(frame, segment, signals["text_embeds"], signals["instruction_mask"])

        score = snap(row, 1 / n)
        turn = turns(score.unflatten(1, (self.frames, patches)), segment).flatten(1)
        order = turn * n + placement(score)  # distinct: by turn, then by score
        own = segment.unsqueeze(-1).expand(-1, -1, patches).flatten(1)
        ahead = (own.unsqueeze(-1) == own.unsqueeze(-2)) & (order.unsqueeze(-2) < order.unsqueeze(-1))
        chosen = ahead.to(torch.int64).sum(-1) < take(quota, own)
        index = select(force(-order.float(), chosen), self.keep)
        return Reduced(take(hidden, index), index)

    def _segment(self, frame: Tensor) -> Tensor:
        """int64 [batch, frames]: every frame's segment. frame: unit vectors [batch, frames, dim]."""
        assert self.segments is not None and self.frames is not None
        if self.segments == 1:
            return torch.zeros_like(frame[..., 0], dtype=torch.int64)
        begins = rank(snap((frame[:, 1:] * frame[:, :-1]).sum(-1)), self.segments - 1, largest=False) + 1
        return (begins.unsqueeze(1) <= torch.arange(self.frames).unsqueeze(-1)).to(torch.int64).sum(-1)

    def _quota(self, frame: Tensor, segment: Tensor, text: Tensor, asks: Tensor) -> Tensor:
        """int64 [batch, segments]."""
        assert self.segments is not None and self.keep is not None
        mask = asks.float().unsqueeze(-1)
        question = normalize((text.float() * mask).sum(1) / mask.sum(1).clamp(min=1))
        near = snap((frame @ question.unsqueeze(-1)).squeeze(-1))
        low = near.amin(-1, keepdim=True)
        relevance = (near - low) / (near.amax(-1, keepdim=True) - low).clamp(min=1)
        member = one_hot(segment, self.segments, torch.float32)
        share = ((1 + self.strength * relevance).unsqueeze(1) @ member).squeeze(1)
        return quotas(share, self.keep)


def turns(score: Tensor, segment: Tensor) -> Tensor:
    """int64 [batch, frames, P]: in how many frames of its segment a token's place has a better score.

    Args:
        score: snapped [batch, frames, P]. segment: int64 [batch, frames].
    """
    place = torch.arange(segment.shape[1])
    same = (segment.unsqueeze(-1) == segment.unsqueeze(-2)).unsqueeze(-1)
    mine, other = score.unsqueeze(2), score.unsqueeze(1)  # [batch, mine, other, P]
    earlier = (place < place[:, None]).unsqueeze(-1)
    better = (other > mine) | ((other == mine) & earlier)
    return (same & better).to(torch.int64).sum(2)


METHOD = AdaTP
