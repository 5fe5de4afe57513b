"""Drop the patches most similar to all others, in rounds, inside one tower block.

hidden [batch, frames, tokens, dim], keys [batch, frames, tokens, head_dim] (mean over heads), size
[batch, frames, tokens] → tokens [batch, frames, tokens - r, dim] in raster order, CLS in front; index int64 and
size accordingly.

Between attention and MLP of the block:
1. The patches' keys are compared by cosine, all with all.
2. A patch's score is its mean similarity to the patches that are left, itself included. The highest go, the
   earlier among equals.
3. Repeat until the rest is as small as wanted. Of N patches the first round drops ⌊N / 16⌋; every later one as
   many as there are left, divided by what the round before dropped (576: 36, 15, 35, 14, …).

Source: Jeddi et al. 2025, "Similarity-Aware Token Pruning: Your VLM but Faster", arXiv:2503.11549 (its ViT mode;
the LLM mode acts elsewhere).
Knobs:
    keep / keep_ratio: patches per frame that leave the tower (CLS not counted; the authors' 376 counts it).
    schedule: patches that go, one number per tower block joined by +, for other blocks than the paper's one
        (then `keep` follows). By default all go in the authors' block 19 of 0..22, or its counterpart in a
        tower of another depth.
Differs: the official loop cannot end once a round would drop nothing, here a round drops at least one; batches
are allowed; equal scores go to the earlier patch; works without CLS. The odd sizes of the rounds come from a
variable that is used twice, and are kept.
Position: *keep*, the dropped patches leave holes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from graphs._blocks import normalize, one_hot, rank, select, snap
from graphs._contract import Reduced, Signals, Site, Tier
from graphs._torch import torch
from graphs._tower import Scheduled, at, pruned, with_cls

EXAMPLES = ("saint:keep=375", "saint:keep_ratio=0.25", "saint:schedule=5+4")

GONE = -(2.0**22)
"""Below every snapped mean of cosines."""


@dataclass(frozen=True)
class Saint(Scheduled):
    """Drop patches that resemble all others, in rounds."""

    paper: ClassVar[str] = "Jeddi et al. 2025, arXiv:2503.11549"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "keep"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "keys")

    def places(self, site: Site) -> tuple[int, ...]:
        return (at(site, 19 / 22),)

    def reduce_frame(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        unit = normalize(signals["keys"][:, cls_tokens:])
        n = unit.shape[1]
        similarity = unit @ unit.transpose(1, 2)
        alive = torch.ones_like(unit[..., 0])
        left = n
        for drop in rounds(n, n - self.removes(block)):
            mean = (similarity @ alive.unsqueeze(-1)).squeeze(-1) / left
            goes = rank(torch.where(alive > 0, snap(mean), GONE), drop)
            alive = alive - one_hot(goes, n, torch.float32).sum(1)
            left -= drop
        return pruned(signals, with_cls(select(alive, left), cls_tokens))


def rounds(tokens: int, keep: int) -> Iterator[int]:
    """How many patches each round drops.

    >>> list(rounds(576, 375))
    [36, 15, 35, 14, 34, 13, 33, 12, 9]
    """
    drop = 16
    while tokens > keep:
        drop = max(1, min(tokens - keep, tokens // drop))
        yield drop
        tokens -= drop


METHOD = Saint
