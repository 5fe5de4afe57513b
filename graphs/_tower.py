"""What in-tower methods share: how many tokens go in which block, and CLS in front."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

from graphs._blocks import ascending, rank, take
from graphs._contract import OF_PROMPT, PerFrameInTower, Reduced, ReductionError, Signals, Site, keep_count
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S", bound="Scheduled")


@dataclass(frozen=True)
class Scheduled(PerFrameInTower):
    """An in-tower method that removes `schedule[block]` tokens of every frame in each block.

    A fitted method has `keep` and one number per tower block. Subclasses say where the paper acts.
    """

    halves: ClassVar[bool] = False
    """Whether a block can remove at most half of the patches that reach it; else it leaves at least `fewest`."""
    fewest: ClassVar[int] = 1

    keep: int | None = None
    keep_ratio: float | None = None
    schedule: tuple[int, ...] | None = None

    @abstractmethod
    def places(self, site: Site) -> Sequence[int]:
        """The tower blocks it acts in, ascending, if `schedule` does not say so."""

    def fit(self: S, site: Site) -> S:
        self.check()
        self.require(site)
        if self.schedule is None:
            keep = keep_count(self.keep, self.keep_ratio, site.tokens)
            schedule = plan(site.tokens, keep, self.places(site), site.depth, halves=self.halves, fewest=self.fewest)
        else:
            schedule = checked(self.schedule, site.tokens, site.depth, halves=self.halves, fewest=self.fewest)
            keep = site.tokens - sum(schedule)
            if self.keep_ratio is not None or self.keep not in (None, keep):
                given = f"`keep` = {self.keep}" if self.keep_ratio is None else f"`keep_ratio` = {self.keep_ratio:g}"
                raise ReductionError(f"this `schedule` keeps {keep} of {site.tokens} tokens; leave out {given}")
        return replace(self, keep=keep, keep_ratio=None, schedule=schedule, position=self.resolved_position())

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return behind(site, self.keep)

    @property
    def blocks(self) -> tuple[int, ...]:
        assert self.schedule is not None
        return tuple(block for block, r in enumerate(self.schedule) if r)

    def removes(self, block: int) -> int:
        assert self.schedule is not None
        return self.schedule[block]


def plan(
    tokens: int, keep: int, blocks: Sequence[int], depth: int, *, halves: bool, fewest: int = 1, what: str = "keep"
) -> tuple[int, ...]:
    """Removals per tower block, spread evenly over `blocks` (what does not divide goes first). If a block can at most
    halve, earlier ones remove as much more as later ones need.

    >>> plan(576, 100, (3, 6, 9), 12, halves=True)
    (0, 0, 0, 176, 0, 0, 200, 0, 0, 100, 0, 0)
    """
    smallest = -(-tokens // 2 ** len(blocks)) if halves else min(fewest, tokens)
    if keep < smallest:
        why = (
            f"{len(blocks)} blocks, each merging at most half, bring {tokens} no lower"
            if halves
            else "no fewer can stay"
        )
        raise ReductionError(f"`{what}` must be at least {smallest}: {why}; found {keep}")
    out = [0] * depth
    for ahead, block in zip(range(len(blocks), 0, -1), blocks, strict=True):
        r = -(-(tokens - keep) // ahead)
        if halves:
            r = min(max(r, tokens - keep * 2 ** (ahead - 1)), tokens // 2)
        out[block] = r
        tokens -= r
    return tuple(out)


def checked(
    schedule: tuple[int, ...], count: int, depth: int, *, halves: bool, fewest: int = 1, knob: str = "schedule"
) -> tuple[int, ...]:
    """A given schedule, one number per tower block, each within what a block can remove of `count` tokens (frames)."""
    if len(schedule) != depth:
        raise ReductionError(f"`{knob}` takes one number for each of the tower's {depth} blocks; found {len(schedule)}")
    for block, r in enumerate(schedule):
        most = count // 2 if halves else max(0, count - fewest)
        if not 0 <= r <= most:
            raise ReductionError(f"`{knob}` may remove 0..{most} of the {count} that reach block {block}; found {r}")
        count -= r
    return schedule


def at(site: Site, share: float) -> int:
    """The block at `share` of the tower's depth (0: first, 1: last), the earlier of two equally near ones.

    So a paper's "block 19 of 0..22" finds its counterpart in a tower of another depth.
    """
    return math.ceil(share * (site.depth - 1) - 0.5)


def behind(site: Site, keep: int, frames: int | None = None) -> Site:
    """The site behind a tower that lost tokens: attention and keys of its last block no longer fit."""
    frames = site.frames if frames is None else frames
    return replace(site, tokens=keep, frames=frames, grid=None, signals=site.signals & {"hidden", "cls", *OF_PROMPT})


def with_cls(places: Tensor, cls_tokens: int) -> Tensor:
    """Places among the patches [batch, k] → among all tokens, CLS (if there is one) in front."""
    return torch.cat([torch.zeros_like(places[:, :1]), places + 1], 1) if cls_tokens else places


def pruned(signals: Signals, kept: Tensor) -> Reduced:
    """Only the tokens `kept` int64 [batch, k], CLS counted, unchanged."""
    return Reduced(take(signals["hidden"], kept), kept, take(signals["size"], kept))


def in_order(out: Reduced) -> Reduced:
    """The same tokens by ascending index."""
    assert out.size is not None
    order = rank(out.index, out.index.shape[-1], largest=False)
    return Reduced(take(out.tokens, order), ascending(out.index), take(out.size, order))
