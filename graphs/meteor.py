"""Inside the tower, first drop patches close to the average, later those CLS ignores.

hidden [batch, frames, tokens, dim], cls_attention and size [batch, frames, tokens] → tokens
[batch, frames, tokens - r, dim] in raster order, CLS in front; index int64 and size accordingly.

Between attention and MLP of two blocks:
1. *Shallow*: the patches whose features have the largest cosine with the mean of all patches go.
2. *Deep*: the patches with the least attention from CLS (mean over heads) go.
Of equal scores the later patch goes.

Source: Liu et al. 2025, "METEOR: Multi-Encoder Collaborative Token Pruning for Efficient Vision Language Models",
arXiv:2507.20842. No code is released.
Knobs:
    keep / keep_ratio: patches per frame that leave the tower (CLS not counted).
    middle: patches between the two blocks; by default halfway between all and `keep`.
    shallow, deep: the two blocks; by default at a third and at two thirds of the tower.
Differs: this is the pruning inside one encoder, from the paper's description of it. Ours are its two blocks, the
budget of each (the paper spreads a budget by the rank of the features), the score of the shallow stage in
numbers, and that each stage acts in one block. The paper's cooperation between several encoders and with the
question needs several encoders; before the language model, other methods do the latter.
Position: *keep*, the dropped patches leave holes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._blocks import normalize, select, snap
from graphs._contract import PerFrameInTower, Reduced, ReductionError, Signals, Site, Tier, keep_count
from graphs._tower import behind, pruned, with_cls

EXAMPLES = ("meteor:keep=144", "meteor:keep_ratio=0.5,middle=40,shallow=0,deep=5")


@dataclass(frozen=True)
class Meteor(PerFrameInTower):
    """Prune by redundancy in a shallow block, by the attention of CLS in a deep one."""

    paper: ClassVar[str] = "Liu et al. 2025, arXiv:2507.20842"
    tier: ClassVar[Tier] = "trained"
    paper_position: ClassVar[Literal["keep", "compact"]] = "keep"

    keep: int | None = None
    keep_ratio: float | None = None
    middle: int | None = None
    shallow: int | None = None
    deep: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "cls_attention")

    def fit(self, site: Site) -> Meteor:
        self.check()
        self.require(site)
        keep = keep_count(self.keep, self.keep_ratio, site.tokens)
        middle = (site.tokens + keep) // 2 if self.middle is None else self.middle
        if not keep <= middle <= site.tokens:
            raise ReductionError(f"`middle` must be in {keep}..{site.tokens}; found {middle}")
        shallow = site.depth // 3 if self.shallow is None else self.shallow
        deep = 2 * site.depth // 3 if self.deep is None else self.deep
        if not 0 <= shallow < deep < site.depth:
            raise ReductionError(
                f"`shallow` and `deep` are two of the tower's blocks 0..{site.depth - 1}, in this order; "
                f"found {shallow} and {deep}"
            )
        position = self.resolved_position()
        return replace(self, keep=keep, keep_ratio=None, middle=middle, shallow=shallow, deep=deep, position=position)

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return behind(site, self.keep)

    @property
    def blocks(self) -> tuple[int, ...]:
        assert self.shallow is not None and self.deep is not None
        return self.shallow, self.deep

    def reduce_frame(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        assert self.keep is not None and self.middle is not None
        if block == self.shallow:
            patches = signals["hidden"][:, cls_tokens:].float()
            usual = normalize(patches) @ normalize(patches.mean(1, keepdim=True)).transpose(1, 2)
            kept = select(-snap(usual).squeeze(-1), self.middle)
        else:
            attention = signals["cls_attention"][:, cls_tokens:]
            kept = select(snap(attention, 1 / attention.shape[1]), self.keep)
        return pruned(signals, with_cls(kept, cls_tokens))


METHOD = Meteor
