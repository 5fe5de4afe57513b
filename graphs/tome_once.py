"""Merge the most similar tokens behind the tower, in a few rounds of ToMe's matching.

tokens [batch, frames · keep, dim]; index int64 [batch, frames · keep], of a merged token the last partner it was
merged into; size float32 [batch, frames · keep].

Every round, on the n tokens that are left:
1. Those at even places form set A, those at odd places set B.
2. Every a in A looks for its most similar b in B by cosine of the metric, the earlier one among equals.
3. The r tokens of A with the best match (the earlier among equals) merge into their b. Tokens and metric become
   means weighted by size.
4. Out come the rest of A, then B. After the last round the tokens go back to raster order.

Source: the matching is from Bolya et al. 2023, "Token Merging: Your ViT But Faster", ICLR 2023, arXiv:2210.09461.
Used on final features it is how several later methods merge to a fixed count.
Knobs (per frame):
    keep / keep_ratio: tokens that are left.
    rounds: by default as few as reach `keep`, as a round at most halves. The merges are spread evenly over the
        rounds, as far as the last ones can still reach `keep`. More rounds merge better pairs and cost more.
    metric: what is compared, "keys" (mean over heads, as in ToMe) or the tokens themselves ("hidden").
    order: "raster", or "paper" for what the last round yields.
Differs: keys of merged tokens are means of keys, where ToMe has fresh ones in every block; `rounds` and raster order
are ours; equal scores go to the earlier token; everything is accumulated in float32 over all rounds, then cast back.
Position: *compact*, as in ToMe; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._bipartite import match, merge
from graphs._blocks import ascending, rank, spread, take
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Tier
from graphs._torch import torch

EXAMPLES = ("tome_once:keep=64", "tome_once:keep_ratio=0.25,metric=hidden,rounds=6", "tome_once:keep=12,order=paper")


@dataclass(frozen=True)
class ToMeOnce(PerFrame):
    """Merge the most similar tokens of the final features."""

    tier: ClassVar[Tier] = "exact"
    paper: ClassVar[str] = "Bolya et al. 2023, arXiv:2210.09461"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    rounds: int | None = None
    metric: Literal["keys", "hidden"] = "keys"
    order: Literal["paper", "raster"] = "raster"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",) if self.metric == "hidden" else ("hidden", "keys")

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> ToMeOnce:
        known = PerFrame.fit(self, site)
        assert known.keep is not None
        fewest = 0
        while known.keep * 2**fewest < site.tokens:
            fewest += 1
        rounds = fewest if known.rounds is None else known.rounds
        if rounds < fewest:
            raise ReductionError(
                f"`rounds` must be at least {fewest}, as each at most halves and {site.tokens} tokens are to become "
                f"{known.keep}; found {rounds}"
            )
        return replace(known, rounds=rounds)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.rounds is not None
        hidden = signals["hidden"]
        n = hidden.shape[1]
        x, index = hidden.float(), spread(list(range(n)), hidden)
        metric = x if self.metric == "hidden" else signals["keys"].float()
        size = torch.ones_like(x[..., 0])
        for r in plan(n, self.keep, self.rounds):
            found = match(metric, r)
            metric = merge(metric, size, found).tokens
            x, came, merged = merge(x, size, found)
            assert merged is not None
            index, size = take(index, came), merged
        if self.order == "raster":
            order = rank(index, self.keep, largest=False)
            x, index, size = take(x, order), ascending(index), take(size, order)
        return Reduced(x.to(hidden.dtype), index, size)


def plan(tokens: int, keep: int, rounds: int) -> list[int]:
    """Merges per round, none of which is 0: even shares, but never so few that later rounds would have to merge more
    than half.

    >>> plan(576, 64, 4)
    [128, 192, 128, 64]
    """
    out = []
    for ahead in range(rounds, 0, -1):
        even, needed = -(-(tokens - keep) // ahead), tokens - keep * 2 ** (ahead - 1)
        r = min(max(even, needed), tokens // 2)
        out += [r] if r else []
        tokens -= r
    return out


METHOD = ToMeOnce
