"""Keep tokens that differ from one another and matter to the question: a conditional determinantal point process.

tokens [batch, frames · keep, dim] in raster order; index int64 [batch, frames · keep].

1. *Relevance* r of a token: its cosine to the question, scaled linearly so that the frame's tokens span 0 to 1.
2. *Kernel* L[i, j] = r_i · cos(x_i, x_j) · r_j, the tokens compared behind the projector.
3. Greedy search for the subset of largest determinant: choose the token with the largest diagonal entry, then take out
   of L what it explains (L - e eᵀ with e = L[chosen] / √L[chosen, chosen], the Schur complement), until `keep` are
   chosen. Of equal entries the earlier token wins.

Source: Zhang et al. 2025, "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
MLLMs" (CDPruner), NeurIPS 2025, arXiv:2506.10967.
Knobs (per frame; per tile in multi-tile models):
    keep / keep_ratio: tokens that stay.
    relevance: where the question is met: "clip", in the space a CLIP tower shares with its text, "llm", among the
        prompt's embeddings (masked mean), or "auto": clip where there is one.
    per_step: how many are chosen at a time. Each step is about 25 nodes of the graph; 1 is the exact method. What
        tokens chosen together explain is divided by √(sum over them of |L|) instead, which is exact as long as they
        are unlike or all alike, and never takes out too much; but of two alike both may be chosen.
Differs: in clip space relevance falls with the cosine, as in the official code (patches of CLIP score inverted); in
the language model's space it rises with it, as the paper has it. If all tokens are equally relevant they count 1,
where the code divides by 0. Diagonal entries below 1/256 count as equal, and as that much when divided by: once the
tokens' span is exhausted only rounding is left, and the earliest tokens fill up. The code's incremental Cholesky factors are
here the equivalent update of the whole matrix. `per_step` and the language model's space are ours.
Position: *compact*, as in the official code; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import FORCED, SNAP, ascending, first, normalize, rank, snap, take
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Space, Tier
from graphs._text import Meeting, mean_text, needs, resolved
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("cdpruner:keep=32", "cdpruner:keep_ratio=0.25,relevance=llm,per_step=8")

SMALL = 1 / 256
"""What is left of a token's variance of up to 1 counts as nothing below this."""


@dataclass(frozen=True)
class CDPruner(PerFrame):
    """Keep a subset that is diverse under the condition of the question."""

    tier: ClassVar[Tier] = "exact"
    paper: ClassVar[str] = "Zhang et al. 2025, arXiv:2506.10967"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    relevance: Meeting = "auto"
    per_step: int = 1

    @property
    def space(self) -> Space:
        return "llm"

    @property
    def needs(self) -> tuple[str, ...]:
        """With `relevance` still at "auto": what the paper needs."""
        return ("hidden", *needs(self.relevance))

    def fit(self, site: Site) -> CDPruner:
        self.check()
        known = PerFrame.fit(replace(self, relevance=resolved(self.relevance, site)), site)
        if known.per_step < 1:
            raise ReductionError(f"`per_step` is how many tokens one step chooses, at least 1; found {known.per_step}")
        return known

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None
        hidden = signals["hidden"]
        unit = normalize(hidden)
        if self.relevance == "clip":
            cosine = -(normalize(signals["aligned"]) @ normalize(signals["aligned_text"]).unsqueeze(-1)).squeeze(-1)
        else:
            cosine = (unit @ normalize(mean_text(signals)).unsqueeze(-1)).squeeze(-1)
        relevant = spanning(cosine).unsqueeze(-1) * unit
        index = ascending(greedy(relevant @ relevant.transpose(1, 2), self.keep, self.per_step))
        return Reduced(take(hidden, index), index)


def spanning(score: Tensor) -> Tensor:
    """Cosines [batch, n] snapped and scaled to 0..1 per row (plus the official code's 1e-6 over the range); 1 if all
    are equal."""
    score = snap(score)
    low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
    width = high - low
    return torch.where(width > 0, (score - low + 1e-6 * SNAP) / torch.where(width > 0, width, 1.0), 1.0)


def greedy(kernel: Tensor, keep: int, per_step: int = 1) -> Tensor:
    """int64 [batch, keep]: a subset of large determinant, in the order in which it was chosen.

    Args:
        kernel: float32 [batch, n, n], positive semidefinite, of entries up to about 1.
    """
    place = torch.arange(kernel.shape[1])
    variance = (kernel * torch.eye(kernel.shape[1])).sum(-1)
    chosen: list[Tensor] = []
    while True:
        count = min(per_step, keep - per_step * len(chosen))
        score = snap(variance)
        score = torch.where(score.abs() < SMALL * SNAP, 0.0, score)
        best = first(score).unsqueeze(-1) if count == 1 else rank(score, count)
        chosen.append(best)
        if keep <= per_step * len(chosen):
            return torch.cat(chosen, 1)
        rows = take(kernel, best)  # [batch, count, n]
        shared = take(rows.transpose(1, 2), best).abs().sum(1).clamp(min=SMALL)  # [batch, count]
        explained = rows / shared.sqrt().unsqueeze(-1)
        kernel = kernel - explained.transpose(1, 2) @ explained
        variance = variance - torch.where(best.unsqueeze(-1) == place, FORCED, explained * explained).sum(1)


METHOD = CDPruner
