"""Merge similar tokens in every tower block, so that the tower itself gets shorter.

hidden [batch, frames, tokens, dim], keys [batch, frames, tokens, head_dim] (mean over heads), size
[batch, frames, tokens] → tokens [batch, frames, tokens - r, dim], index int64 [batch, frames, tokens - r] into
this block's tokens, size [batch, frames, tokens - r].

Between attention and MLP of block l:
1. Tokens at even places (CLS first, if there is one) form set A, those at odd places set B.
2. Every a in A looks for its most similar b in B by cosine of the keys, the earlier one among equals. CLS
   does not.
3. The r_l tokens of A with the best match (the earlier among equals) merge into their b. A merged token is
   the mean of its parts weighted by size, its size their sum; `index` names b.
4. Out come the rest of A in ascending order, then B: CLS stays in front, the raster is lost.

The tower adds log(size) of a key to its attention logits ("proportional attention") in the following blocks.

Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster", ICLR 2023, arXiv:2210.09461.
Knobs:
    keep / keep_ratio: patches per frame that leave the tower (CLS not counted). The paper's r counts what
        goes per block: N - keep is the sum of all r_l.
    schedule: how N - keep is spread over the blocks: "constant" (equal, what does not divide goes first),
        "linear" (the paper's decreasing schedule, from twice the mean to 0), or the paper's r itself: one
        number for all blocks, or one per block joined by + (then `keep` follows). Where the plan would leave
        too much for the last blocks, which can at most halve, earlier ones merge more. `fit` turns it into
        one number per block.
Differs: the paper caps r at half the tokens silently, here a schedule that cannot be met is refused; without
CLS the official code leaves the rest of A by descending similarity, here it is always ascending; tokens and
sizes are accumulated in float32, then cast back.
Position: *compact*, because the raster is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._bipartite import match, merge
from graphs._contract import OF_PROMPT, PerFrameInTower, Reduced, ReductionError, Signals, Site, Tier, keep_count

EXAMPLES = ("tome:keep=144", "tome:keep_ratio=0.5,schedule=linear", "tome:schedule=13")


@dataclass(frozen=True)
class ToMe(PerFrameInTower):
    """Merge the most similar tokens of every tower block."""

    paper: ClassVar[str] = "Bolya et al. 2023, arXiv:2210.09461"
    tier: ClassVar[Tier] = "exact"

    keep: int | None = None
    keep_ratio: float | None = None
    schedule: Literal["constant", "linear"] | tuple[int, ...] = "constant"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "keys")

    def fit(self, site: Site) -> ToMe:
        self.check()
        self.require(site)
        if isinstance(self.schedule, tuple):
            schedule = _explicit(self.schedule, site)
            keep = site.tokens - sum(schedule)
            if self.keep_ratio is not None or self.keep not in (None, keep):
                given = f"`keep` = {self.keep}" if self.keep_ratio is None else f"`keep_ratio` = {self.keep_ratio:g}"
                raise ReductionError(f"this `schedule` keeps {keep} of {site.tokens} tokens; leave out {given}")
        else:
            keep = keep_count(self.keep, self.keep_ratio, site.tokens)
            schedule = _planned(site.tokens, keep, site.depth, self.schedule)
        return replace(self, keep=keep, keep_ratio=None, schedule=schedule, position=self.resolved_position())

    def after(self, site: Site) -> Site:
        """The site behind the tower.

        Attention and keys are from before the last block's merge: they fit the tokens only if it merges none.
        """
        assert self.keep is not None and isinstance(self.schedule, tuple)
        kept = {"hidden", "cls", *OF_PROMPT}
        if self.schedule[-1] == 0:
            kept |= {s for s in site.signals if "@" not in s}
        return replace(site, tokens=self.keep, grid=None, signals=site.signals & kept)

    @property
    def merges(self) -> bool:
        return True

    @property
    def blocks(self) -> tuple[int, ...]:
        assert isinstance(self.schedule, tuple)
        return tuple(block for block, r in enumerate(self.schedule) if r)

    def reduce_frame(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        assert isinstance(self.schedule, tuple)
        return merge(signals["hidden"], signals["size"], match(signals["keys"], self.schedule[block], cls_tokens))


def _explicit(schedule: tuple[int, ...], site: Site) -> tuple[int, ...]:
    """The user's r per block, checked against what the blocks can merge."""
    if len(schedule) == 1:
        schedule = schedule * site.depth
    if len(schedule) != site.depth:
        raise ReductionError(
            f"`schedule` takes one number, or one for each of the tower's {site.depth} blocks; found {len(schedule)}"
        )
    left = site.tokens
    for block, r in enumerate(schedule):
        if not 0 <= r <= left // 2:
            raise ReductionError(
                f"`schedule` may merge 0..{left // 2} of the {left} tokens that reach block {block}; found {r}"
            )
        left -= r
    return schedule


def _planned(tokens: int, keep: int, depth: int, kind: str) -> tuple[int, ...]:
    """r per block that lead from `tokens` to `keep`; every block merges at most half."""
    smallest = -(-tokens // 2**depth)
    if keep < smallest:
        raise ReductionError(
            f"`keep` must be at least {smallest}: {depth} blocks, each merging at most half, bring {tokens} "
            f"tokens no lower; found {keep}"
        )
    weights = [1] * depth if kind == "constant" else [depth - i if depth == 1 else depth - 1 - i for i in range(depth)]
    schedule, left = [], tokens
    for block in range(depth):
        ahead = sum(weights[block:])
        planned = -(-(left - keep) * weights[block] // ahead) if ahead else 0
        needed = left - keep * 2 ** (depth - 1 - block)  # later blocks can bring keep · 2^b down to keep, not more
        r = min(max(planned, needed), left // 2)
        schedule.append(r)
        left -= r
    assert left == keep
    return tuple(schedule)


METHOD = ToMe
