"""In every tower block, prune what CLS ignores and merge the next least important patches.

hidden [batch, frames, tokens, dim], cls_attention and size [batch, frames, tokens] → tokens
[batch, frames, m, dim], index int64 and size [batch, frames, m]; all counts with CLS.

Between attention and MLP of block l:
1. Tokens are ranked by the attention of CLS (mean over heads), CLS itself first, the earlier among equals.
2. The first p_l stay, the rest is pruned.
3. Of these the first m_l are targets. Each of the others merges into the target with the most similar features
   (cosine of hidden; not into CLS; among equals the first in `order`).
4. A merged token is the plain mean of target and what joined it. Its size is the target's plus the size of each
   joining token times its similarity.

The tower adds log(size) of a key to its attention logits in the following blocks.

Source: Chen et al. 2023, "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023,
arXiv:2305.17997.
Knobs:
    keep / keep_ratio: patches per frame that leave the tower (CLS not counted).
    prune, merge: the paper's p_l and m_l, tokens left with CLS counted, one number per tower block joined by +, as
        in the tables of the official repository (give both; `keep` follows). Without them the counts fall on a
        straight line from all tokens to `keep`, and in every block half of what goes is pruned (rounded down),
        half merged. `fit` stores the tables.
    order: "raster", or "paper" for tokens by importance.
Differs: the tables are learned, and known only for a few classification towers, hence the straight line; the
order does not matter there, so raster is the default; a similarity below 0 adds no size, where the official code
would take away from it; similarities count to 1/4096; equal scores go to the earlier token; tokens and sizes are accumulated in float32.
Position: *compact*, because merged tokens have no one place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import SNAP, first, normalize, one_hot, rank, snap, take
from graphs._contract import PerFrameInTower, Reduced, ReductionError, Signals, Site, Tier, keep_count
from graphs._torch import torch
from graphs._tower import behind, in_order, with_cls

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = (
    "diffrate:keep=144",
    "diffrate:keep_ratio=0.5,order=paper",
    "diffrate:prune=60+50+48+41+40+30,merge=55+50+45+41+33+20",
)


@dataclass(frozen=True)
class DiffRate(PerFrameInTower):
    """Prune and merge by the attention of CLS in every tower block."""

    paper: ClassVar[str] = "Chen et al. 2023, arXiv:2305.17997"
    tier: ClassVar[Tier] = "trained"

    keep: int | None = None
    keep_ratio: float | None = None
    prune: tuple[int, ...] | None = None
    merge: tuple[int, ...] | None = None
    order: Literal["raster", "paper"] = "raster"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "cls_attention")

    def fit(self, site: Site) -> DiffRate:
        self.check()
        self.require(site)
        prune, merge = self.prune, self.merge
        if (prune is None) != (merge is None):
            raise ReductionError("`prune` and `merge` are two columns of one table: give both or neither")
        if prune is None or merge is None:
            keep = keep_count(self.keep, self.keep_ratio, site.tokens)
            prune, merge = line(site.tokens, keep, site.depth)
        else:
            prune, merge = tables(prune, merge, site)
            keep = merge[-1] - 1
            if self.keep_ratio is not None or self.keep not in (None, keep):
                given = f"`keep` = {self.keep}" if self.keep_ratio is None else f"`keep_ratio` = {self.keep_ratio:g}"
                raise ReductionError(f"this table keeps {keep} of {site.tokens} patches; leave out {given}")
        position = self.resolved_position()
        return replace(self, keep=keep, keep_ratio=None, prune=prune, merge=merge, position=position)

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return behind(site, self.keep)

    @property
    def merges(self) -> bool:
        return True

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that remove tokens; the first count is not known here, so block 0 always is one."""
        assert self.merge is not None
        return tuple(b for b, m in enumerate(self.merge) if b == 0 or m < self.merge[b - 1])

    def reduce_frame(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        assert self.prune is not None and self.merge is not None
        hidden, size = signals["hidden"], signals["size"]
        p, m = self.prune[block], self.merge[block]
        score = snap(signals["cls_attention"][:, 1:], 1 / hidden.shape[1])
        ranked = with_cls(rank(score, p - 1), cls_tokens)
        targets, sources = ranked[:, :m], ranked[:, m:]
        out = Reduced(take(hidden, targets), targets, take(size, targets))
        out = in_order(out) if self.order == "raster" else out
        return joined(out, take(hidden, sources), take(size, sources)) if p > m else out


def line(tokens: int, keep: int, depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tables p and m of a straight line from all patches to `keep`.

    >>> line(24, 12, 3)
    ((23, 19, 15), (21, 17, 13))
    """
    left = [tokens - (tokens - keep) * block // depth + 1 for block in range(depth + 1)]
    return tuple(a - (a - b) // 2 for a, b in pairwise(left)), tuple(left[1:])


def tables(prune: tuple[int, ...], merge: tuple[int, ...], site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Given tables, with counts that would add tokens brought down, as slicing does in the official code."""
    left, p, m = site.tokens + 1, [], []
    for name, table in (("prune", prune), ("merge", merge)):
        if len(table) != site.depth:
            raise ReductionError(
                f"`{name}` takes one number for each of the tower's {site.depth} blocks; found {len(table)}"
            )
        if min(table) < 2:
            raise ReductionError(f"`{name}` counts CLS and must leave a patch, so at least 2; found {min(table)}")
    for after_prune, after_merge in zip(prune, merge, strict=True):
        p.append(min(after_prune, left))
        left = min(after_merge, p[-1])
        m.append(left)
    return tuple(p), tuple(m)


def joined(into: Reduced, tokens: Tensor, size: Tensor) -> Reduced:
    """`into` [batch, m], CLS in front, with `tokens` [batch, s, dim] merged into their most similar."""
    assert into.size is not None
    similarity = snap(normalize(tokens) @ normalize(into.tokens[:, 1:]).transpose(1, 2))
    own = one_hot(first(similarity) + 1, into.index.shape[1], torch.float32).transpose(1, 2)
    count = 1 + own.sum(-1, keepdim=True)
    mean = (into.tokens.float() + own @ tokens.float()) / count
    strength = size * (similarity.amax(-1).clamp(min=0) / SNAP)
    return Reduced(mean.to(tokens.dtype), into.index, into.size + (own @ strength.unsqueeze(-1)).squeeze(-1))


METHOD = DiffRate
