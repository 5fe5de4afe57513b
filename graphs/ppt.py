"""In three tower blocks, prune if CLS has clear favourites, else merge similar tokens.

hidden [batch, frames, tokens, dim], keys [batch, frames, tokens, head_dim] (mean over heads), cls_attention,
value_norm and size [batch, frames, tokens] → tokens [batch, frames, tokens - r, dim], CLS in front; index int64 and
size accordingly.

Between attention and MLP of the block:
1. A patch's score is the attention of CLS to it (mean over heads) times the length of its values; scores are
   divided by their sum.
2. Variance of the scores at least `threshold`: CLS knows what matters. The r patches with the lowest scores are
   pruned; the others follow by descending score, the earlier first among equals.
3. Otherwise one round of bipartite matching on the keys merges r tokens: see `tome`. CLS takes no part.

Both branches are computed and one is taken, for every frame on its own. The tower adds log(size) of a key to its
attention logits in the following blocks.

Source: Wu et al. 2023, "PPT: Token Pruning and Pooling for Efficient Vision Transformers", arXiv:2310.01812.
Knobs:
    keep / keep_ratio: patches per frame that leave the tower (CLS not counted).
    schedule: the paper's r, one number per tower block joined by + (then `keep` follows). By default the patches
        go in equal parts in the paper's blocks 3, 6 and 9 of 0..11, or their counterparts in a tower of another
        depth. A block can merge at most half; where later ones could not reach `keep`, earlier ones do more.
    threshold: of the variance. By default the paper's 7e-5, which is for 196 patches, times (196 / patches)², as
        the variance of shares of a whole falls with the square of their number.
    order: "paper", or "raster": every block's result sorted by place, which changes who can match whom later.
Differs: a scaled default threshold; equal scores go to the earlier patch; what the official code caps silently is
refused; tokens and sizes are accumulated in float32.
Position: *compact*, because the raster is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._bipartite import match, merge
from graphs._blocks import SNAP, rank, snap
from graphs._contract import Reduced, ReductionError, Signals, Site, Tier
from graphs._torch import torch
from graphs._tower import Scheduled, at, in_order, pruned, with_cls

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("ppt:keep=144", "ppt:keep_ratio=0.5,order=raster", "ppt:schedule=0+20+0+10+6+0,threshold=0.0001")

TINY = 1e-12


@dataclass(frozen=True)
class Ppt(Scheduled):
    """Prune or merge, as the spread of the scores suggests."""

    paper: ClassVar[str] = "Wu et al. 2023, arXiv:2310.01812"
    tier: ClassVar[Tier] = "fixed budget"
    halves: ClassVar[bool] = True

    threshold: float | None = None
    order: Literal["paper", "raster"] = "paper"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "keys", "cls_attention", "value_norm")

    def places(self, site: Site) -> list[int]:
        return sorted({at(site, share) for share in (3 / 11, 6 / 11, 9 / 11)})

    def fit(self, site: Site) -> Ppt:
        known = Scheduled.fit(self, site)
        threshold = 7e-5 * (196 / site.tokens) ** 2 if known.threshold is None else known.threshold
        if threshold <= 0:
            raise ReductionError(f"`threshold` is a variance, above 0; found {threshold:g}")
        return replace(known, threshold=threshold)

    @property
    def merges(self) -> bool:
        return True

    def reduce_frame(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        assert self.threshold is not None
        hidden, r = signals["hidden"], self.removes(block)
        score = (signals["cls_attention"].float() * signals["value_norm"].float())[:, 1:]
        score = score / (score.sum(-1, keepdim=True) + TINY)
        n = score.shape[1]
        variance = (score - score.mean(-1, keepdim=True)).pow(2).sum(-1, keepdim=True) / (n - 1)
        clear = snap(variance, self.threshold) >= SNAP
        kept = pruned(signals, with_cls(rank(snap(score, 1 / n), n - r), cls_tokens))
        out = _where(clear, kept, merge(hidden, signals["size"], match(signals["keys"], r, cls_tokens)))
        return in_order(out) if self.order == "raster" else out


def _where(condition: Tensor, a: Reduced, b: Reduced) -> Reduced:
    """Per frame: condition bool [batch, 1]."""
    assert a.size is not None and b.size is not None
    tokens = torch.where(condition.unsqueeze(-1), a.tokens, b.tokens)
    return Reduced(tokens, torch.where(condition, a.index, b.index), torch.where(condition, a.size, b.size))


METHOD = Ppt
