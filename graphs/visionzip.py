"""Keep the tokens CLS looks at, merge the rest into a few contextual ones.

tokens [batch, frames · keep, dim]; index int64 [batch, frames · keep], -1 for CLS, the target for a
contextual token; size float32 [batch, frames · keep].

1. *Dominant*: the patches with the most attention from CLS at the feature block, in raster order. CLS itself
   is passed on in front of them, as one of the kept tokens.
2. *Contextual*: of the remaining R tokens in raster order, every max(1, R // contextual)-th is a target. All
   others join the target whose key is most similar (cosine, keys averaged over heads), the earlier one among
   equals. A contextual token is *target + mean of those that joined it*: a sum of two, not their average, as
   in the official code; a target nobody joined stays as it is.

Source: Yang et al. 2024, "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
arXiv:2412.04467.
Knobs (per frame; per tile in multi-tile models):
    keep / keep_ratio: D + C of the paper, its D dominant tokens (CLS among them) and C contextual ones.
    contextual: C. By default 10/64 of `keep`, rounded half up: the paper's 54+10, 108+20, 162+30. 0 prunes
        only.
    score: where dominance comes from: "cls" attention, "column" (attention a token receives from all, for
        towers without CLS), or "auto": cls where there is one.
    cls: whether CLS is passed on ("on", "off"); "auto": on when the score is cls, and CLS does not go on by itself.
    order: "paper" (CLS, dominant, contextual) or "raster" (CLS, then by index).
Differs: attention is averaged over heads where the paper sums (same order); equal scores go to the earlier
token; the "column" score and any contextual count are ours; merging is accumulated in float32, then cast
back.
Position: *compact*, as the paper's tokens are simply what the language model gets; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import ascending, complement, normalize, one_hot, pick, rank, select, snap, take
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Tier, keep_count
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = (
    "visionzip:keep=64",
    "visionzip:keep_ratio=0.25,order=raster",
    "visionzip:keep=32,contextual=0,cls=off",
)


@dataclass(frozen=True)
class VisionZip(PerFrame):
    """Keep dominant tokens by attention, merge the others into contextual ones."""

    paper: ClassVar[str] = "Yang et al. 2024, arXiv:2412.04467"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    contextual: int | None = None
    score: Literal["auto", "cls", "column"] = "auto"
    cls: Literal["auto", "on", "off"] = "auto"
    order: Literal["paper", "raster"] = "paper"

    @property
    def needs(self) -> tuple[str, ...]:
        """With knobs still at "auto": what the paper needs."""
        score = "column_attention" if self.score == "column" else "cls_attention"
        keys = () if self.contextual == 0 else ("keys",)
        return ("hidden", *keys, score, *(("cls",) if self._cls_on else ()))

    @property
    def _cls_on(self) -> bool:
        return self.cls == "on" or (self.cls == "auto" and self.score != "column")

    @property
    def passes_cls(self) -> bool:
        return self._cls_on

    @property
    def merges(self) -> bool:
        return self.contextual != 0

    def capacity(self, site: Site) -> int:
        return site.tokens + self._cls_on

    def fit(self, site: Site) -> VisionZip:
        self.check()
        score = self.score
        if score == "auto":
            score = "cls" if "cls_attention" in site.signals else "column"
        known = replace(self, score=score)
        passed_anyway = known.cls == "auto" and site.class_tokens
        known = replace(known, cls="on" if known._cls_on and not passed_anyway else "off")
        keep = keep_count(self.keep, self.keep_ratio, known.capacity(site))
        contextual = (20 * keep + 64) // 128 if self.contextual is None else self.contextual
        if not 0 <= contextual < keep:
            raise ReductionError(
                f"`contextual` is a part of the {keep} tokens `keep` leaves, so it must be in 0..{keep - 1}; "
                f"found {contextual}"
            )
        return PerFrame.fit(replace(known, contextual=contextual), site)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.contextual is not None
        hidden = signals["hidden"]
        n = hidden.shape[1]
        dominant = self.keep - self.contextual - (self.cls == "on")
        if dominant:
            attention = signals["column_attention" if self.score == "column" else "cls_attention"]
            index = select(snap(attention, 1 / n), dominant)
            rest = complement(index, n)
            tokens, size = take(hidden, index), torch.ones_like(index, dtype=torch.float32)
        else:
            rest = torch.arange(n).expand(hidden.shape[0], -1)
            index, size, tokens = rest[:, :0], rest[:, :0].to(torch.float32), hidden[:, :0]
        if self.contextual:
            merged = _contextual(hidden, signals["keys"], rest, self.contextual)
            tokens, index = torch.cat([tokens, merged.tokens], 1), torch.cat([index, merged.index], 1)
            assert merged.size is not None
            size = torch.cat([size, merged.size], 1)
            if self.order == "raster":
                order = rank(index, index.shape[1], largest=False)
                tokens, index, size = take(tokens, order), ascending(index), take(size, order)
        if self.cls == "on":
            cls = signals["cls"].unsqueeze(1)
            front = torch.ones_like(cls[..., 0], dtype=torch.float32)
            tokens, size = torch.cat([cls, tokens], 1), torch.cat([front, size], 1)
            index = torch.cat([-front.to(torch.int64), index], 1)
        return Reduced(tokens, index, size)


def _contextual(hidden: Tensor, keys: Tensor, rest: Tensor, count: int) -> Reduced:
    """Merge the tokens `rest` [batch, R], ascending, into `count` targets spread evenly among them."""
    remaining = rest.shape[1]
    step = max(1, remaining // count)
    target = list(range(0, remaining, step))[:count]
    other = [i for i in range(remaining) if i not in set(target)]
    target_index = pick(rest, target)
    tokens, size = take(hidden, target_index), torch.ones_like(target_index, dtype=torch.float32)
    if other:
        other_index = pick(rest, other)
        metric = normalize(keys)
        similarity = take(metric, other_index) @ take(metric, target_index).transpose(1, 2)
        joined = rank(snap(similarity), 1).squeeze(-1)
        assignment = one_hot(joined, count, torch.float32).transpose(1, 2)
        members = assignment.sum(-1)
        total = assignment @ take(hidden, other_index).float()
        mean = total / members.clamp(min=1).unsqueeze(-1)
        tokens, size = (tokens.float() + mean).to(hidden.dtype), size + members
    return Reduced(tokens, target_index, size)


METHOD = VisionZip
