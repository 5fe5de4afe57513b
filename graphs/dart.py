"""Keep a few pivots and the tokens that duplicate them least.

tokens [batch, frames · keep, dim] in raster order; index int64 [batch, frames · keep].

1. *Pivots*: the tokens whose keys (all heads) have the largest L1 norm.
2. Each pivot in turn, the one of the largest norm first, keeps its share of tokens: those with the lowest cosine to
   it, among the tokens no earlier pivot has kept. `keep` counts the pivots too; what does not divide goes to the
   first pivots, one each.
Of equal tokens the earlier wins throughout.

Source: Wen et al. 2025, "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More"
(DART), EMNLP 2025, arXiv:2502.11494.
Knobs (per frame; per tile in multi-tile models):
    keep / keep_ratio: tokens that stay.
    pivots: the official code's 4 image pivots, or `keep` if that is less.
    norm: whose L1 norm makes a pivot: "joint_keys" (all heads, as published), "keys" (mean over heads), "hidden", or
        "auto": the first of these that the tower offers.
Differs: the official code works behind layer 2 of the language model and has as many text tokens as pivots too, each
with a share of the image tokens; here keys and tokens are the tower's and only the image has pivots. The code takes
the pivots in the order of a Python set, here the best comes first; it rounds shares down and so keeps somewhat fewer
than asked for, here the count is exact.
Position: *keep*, as in the official code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._blocks import FORCED, TINY, ascending, normalize, one_hot, rank, snap, take
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Tier
from graphs._torch import torch

EXAMPLES = ("dart:keep=64", "dart:keep_ratio=0.25,pivots=8,norm=hidden")


@dataclass(frozen=True)
class Dart(PerFrame):
    """Keep pivots and what duplicates them least."""

    tier: ClassVar[Tier] = "exact"
    paper: ClassVar[str] = "Wen et al. 2025, arXiv:2502.11494"

    pivots: int | None = None
    norm: Literal["auto", "joint_keys", "keys", "hidden"] = "auto"

    @property
    def needs(self) -> tuple[str, ...]:
        """With `norm` still at "auto": what the paper needs."""
        return ("hidden",) if self.norm == "hidden" else ("hidden", "joint_keys" if self.norm == "auto" else self.norm)

    def fit(self, site: Site) -> Dart:
        self.check()
        norm = self.norm
        if norm == "auto":
            norm = "joint_keys" if "joint_keys" in site.signals else "keys" if "keys" in site.signals else "hidden"
        known = PerFrame.fit(replace(self, norm=norm), site)
        assert known.keep is not None
        pivots = min(4, known.keep) if known.pivots is None else known.pivots
        if not 1 <= pivots <= known.keep:
            raise ReductionError(f"`pivots` are among the {known.keep} tokens `keep` leaves; found {pivots}")
        return replace(known, pivots=pivots)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.pivots is not None
        hidden = signals["hidden"]
        n = hidden.shape[1]
        norm = signals[self.norm].float().abs().mean(-1)
        pivots = rank(snap(norm, norm.mean(-1, keepdim=True) + TINY), self.pivots)
        unit = normalize(hidden)
        similarity = snap(take(unit, pivots) @ unit.transpose(1, 2))  # [batch, pivots, n]
        kept, taken = [pivots], one_hot(pivots, n, torch.float32).sum(1)
        share, extra = divmod(self.keep - self.pivots, self.pivots)
        for i in range(self.pivots):
            if count := share + (i < extra):
                least = rank(similarity[:, i] + FORCED * taken, count, largest=False)
                kept.append(least)
                taken = taken + one_hot(least, n, torch.float32).sum(1)
        index = ascending(torch.cat(kept, 1))
        return Reduced(take(hidden, index), index)


METHOD = Dart
