"""In a clip from a moving camera, drop what geometry explains, then pick tokens by relevance and novelty.

hidden [batch, frames, P, dim], warp int64 [batch, frames, P], text [batch, text, dim] → tokens [batch, keep, dim] in
raster order, frame by frame; index int64 [batch, keep].

1. *Perspective-aware redundancy*: `warp` tells, from a homography between neighbouring frames, where a token was in
   the frame before. From every later frame the D tokens most similar (cosine) to the one they come from are dropped;
   tokens out of sight before never are, as long as there are others; of equal ones the earlier stay.
2. *Maximal marginal relevance*: of the rest, `keep` tokens are chosen one after the other: the largest
   λ · cos(token, text) - (1 - λ) · (largest cosine to a chosen token of its frame, 0 if there is none),
   the earlier among equals. The text is the mean of the prompt's embeddings, padding masked.

Source: Li et al. 2025, "EgoPrune: Efficient Token Pruning for Egomotion Video Reasoning in Embodied Agent",
arXiv:2507.15428.
Knobs:
    keep / keep_ratio: tokens over the whole clip.
    static_ratio: D / P; by default half of what has to go is dropped as redundant.
    balance: λ.
    diversity: chosen tokens of which a new one must differ, those of its "frame" or of the whole "clip".
    per_step: tokens chosen at once; by default so many that 32 steps do. Above 1, those chosen in the same step are
        not compared with each other.
Differs: no code was published, and this follows the paper's summary of itself: λ = 0.5, the text's mean and the fixed
number in place of a similarity threshold are ours. Key frames are chosen before the tower, and so not here. Where
`per_step` exceeds 1, a step is greedier than the paper's.
Position: *keep*: the dropped tokens leave holes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import ascending, normalize, rank, select, snap, split, spread, take
from graphs._clip import require_frames
from graphs._contract import PerClip, Reduced, ReductionError, Signals, Site, Space, Tier
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("egoprune:keep=64,per_step=8", "egoprune:keep_ratio=0.5,static_ratio=0.25,diversity=clip,per_step=4")

STEPS = 32
NONE = -2.0
"""Below every cosine."""
TAKEN = -1e9
"""Below every score."""


@dataclass(frozen=True)
class EgoPrune(PerClip):
    """Drop tokens that the camera's motion explains, then choose by maximal marginal relevance."""

    paper: ClassVar[str] = "Li et al. 2025, arXiv:2507.15428"
    tier: ClassVar[Tier] = "fixed budget"

    static_ratio: float | None = None
    balance: float = 0.5
    diversity: Literal["frame", "clip"] = "frame"
    per_step: int | None = None

    @property
    def space(self) -> Space:
        return "llm"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "warp", "text", "text_mask")

    def fit(self, site: Site) -> EgoPrune:
        self.check()
        require_frames(site)
        if not 0 <= self.balance <= 1:
            raise ReductionError(f"`balance` must be in 0..1; found {self.balance:g}")
        if self.static_ratio is not None and not 0 <= self.static_ratio <= 1:
            raise ReductionError(f"`static_ratio` must be in 0..1; found {self.static_ratio:g}")
        known = PerClip.fit(self, site)
        assert known.keep is not None
        later = site.frames - 1
        ratio = self.static_ratio
        if ratio is None:
            ratio = min(site.tokens, (site.total - known.keep) // (2 * later)) / site.tokens
        left = site.total - later * _static(ratio, site.tokens)
        if known.keep > left:
            raise ReductionError(
                f"`static_ratio` = {ratio:g} leaves {left} of {site.total} tokens, fewer than `keep` = {known.keep}; "
                f"lower one of them"
            )
        step = -(-known.keep // STEPS) if self.per_step is None else self.per_step
        if not 1 <= step <= known.keep:
            raise ReductionError(f"`per_step` must be in 1..{known.keep}; found {step}")
        return replace(known, static_ratio=ratio, per_step=step)

    def forward(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.static_ratio is not None and self.per_step is not None
        hidden = signals["hidden"]
        frames, patches = hidden.shape[1:3]
        unit = normalize(hidden)
        candidate = spread(list(range(patches)), hidden)
        stay = patches - _static(self.static_ratio, patches)
        if stay:
            change = select(_novelty(unit, signals["warp"]), stay) + (torch.arange(frames - 1) * patches).unsqueeze(-1)
            candidate = torch.cat([candidate, change.flatten(1) + patches], 1)
        x = take(unit.flatten(1, 2), candidate)
        frame = torch.tensor([0] * patches + [f for f in range(1, frames) for _ in range(stay)])
        mask = signals["text_mask"].float().unsqueeze(-1)
        text = normalize((signals["text"].float() * mask).sum(1) / mask.sum(1).clamp(min=1))
        chosen = self._chosen(x, self.balance * (x @ text.unsqueeze(-1)).squeeze(-1), frame)
        index = take(candidate, ascending(chosen))
        return Reduced(take(hidden.flatten(1, 2), index), index)

    def _chosen(self, x: Tensor, relevance: Tensor, frame: Tensor) -> Tensor:
        """int64 [batch, keep], as they are chosen. x: unit vectors [batch, n, dim]; relevance [batch, n], weighted."""
        assert self.keep is not None and self.per_step is not None
        place = torch.arange(x.shape[1])
        nearest = torch.full_like(relevance, NONE)
        chosen = []
        for start in range(0, self.keep, self.per_step):
            penalty = torch.where(nearest > NONE, nearest, 0.0)
            best = rank(snap(relevance - (1 - self.balance) * penalty), min(self.per_step, self.keep - start))
            chosen.append(best)
            near = x @ take(x, best).transpose(1, 2)  # [batch, n, per_step]
            if self.diversity == "frame":
                of_best = take(frame.expand(x.shape[0], -1), best)
                near = torch.where(frame.unsqueeze(-1) == of_best.unsqueeze(1), near, NONE)
            nearest = torch.maximum(nearest, near.amax(-1))
            relevance = torch.where((place.unsqueeze(-1) == best.unsqueeze(1)).any(-1), TAKEN, relevance)
        return torch.cat(chosen, 1)


def _static(ratio: float, patches: int) -> int:
    """Tokens that every later frame loses as redundant."""
    return int(ratio * patches + 0.5)


def _novelty(unit: Tensor, warp: Tensor) -> Tensor:
    """Snapped [batch, frames - 1, P]: minus the cosine with where a token was; above all of these if out of sight."""
    frames = unit.shape[1]
    warp = warp[:, 1:].flatten(0, 1)
    origin = take(unit[:, :-1].flatten(0, 1), torch.where(warp < 0, 0, warp))
    near = snap((unit[:, 1:].flatten(0, 1) * origin).sum(-1))
    return split(torch.where(warp < 0, -TAKEN, -near), frames - 1)


METHOD = EgoPrune
