"""Fit a clip into a budget: fewer frames, detail where the question asks for it, else changes only.

hidden [batch, frames, P, dim] on a grid, text [batch, text, dim] → tokens [batch, keep, dim], frame by frame, each in
raster order; index int64 [batch, keep]; size float32 [batch, keep].

1. *Frames*: in windows of 16, a frame is as redundant as its mean cosine with the window's frames (all its tokens as
   one vector); the middle frame never is. The `keep_frames` least redundant of the clip stay, of equal ones the
   earlier.
2. *Resolution*: L low-resolution tokens per frame (bilinear) are what a frame costs at least. If the budget allows for
   more, the `highres` frames most relevant to the question (mean dot product of low-resolution and text tokens,
   padding masked) keep their P tokens, and the others have L.
3. *Changes*: if the budget does not even allow for L tokens per frame, the first frame of every window of 8 keeps its
   L, and of the others the tokens least similar to that frame's at their place stay (cosine), as many over the clip as
   fit.

As in the official code, 2 and 3 exclude each other: the budget decides.

Source: Shen et al. 2024, "LongVU: Spatiotemporal Adaptive Compression for Long Video-Language Understanding",
arXiv:2410.17434.
Knobs:
    keep / keep_ratio: the budget, tokens over the whole clip. Above L per frame it goes in steps of P - L.
    keep_frames: by default all while the budget allows for L tokens each, else half of them, or as many more as are
        needed to use up the budget.
    highres: frames in full, instead of keep or with it.
    low_grid: rows+columns of the low resolution; by default two thirds of the grid (the paper's 8+8 of 12+12).
    rows: rows of the grid, by default the site's.
Differs: the paper finds redundant frames by DINOv2 features above a cosine of 0.83, here the projected tokens
themselves serve and the number is fixed; its changes are those below a cosine of 0.6 to 0.8, here as many as fit, and
so nothing is cut off behind. The cut at each frame's end when the context is full has no counterpart. The paper's
model is trained with it; its connector in front, which joins features of two towers (SigLIP and DINOv2), is no part of
this; for one tower it is `sva`. Pooling is accumulated in float32, then cast back. `index`: a low-resolution token is
anchored at the patch in the middle of its cell; its size is P / L.
Position: *compact*: the paper hands on the shorter sequence; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import TINY, force, normalize, pick, placement, select, snap, spread, take
from graphs._clip import reachable, require_frames
from graphs._contract import PerClip, Reduced, ReductionError, Signals, Site, Space, Tier
from graphs._groups import rows_of
from graphs._pool import bilinear, pool
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("longvu:keep_ratio=0.6", "longvu:keep_ratio=0.2", "longvu:keep_frames=4,highres=2,low_grid=4+4")

FRAME_WINDOW, CHANGE_WINDOW = 16, 8


@dataclass(frozen=True)
class LongVU(PerClip):
    """Drop redundant frames, then choose resolutions by the question or keep changes only."""

    paper: ClassVar[str] = "Shen et al. 2024, arXiv:2410.17434"
    tier: ClassVar[Tier] = "trained"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    keep_frames: int | None = None
    highres: int | None = None
    low_grid: tuple[int, ...] | None = None
    rows: int | None = None

    @property
    def space(self) -> Space:
        return "llm"

    @property
    def needs(self) -> tuple[str, ...]:
        guided = self.highres is None or self.keep_frames is None or 0 < self.highres < self.keep_frames
        return ("hidden", *(("text", "text_mask") if guided else ()))

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> LongVU:
        self.check()
        require_frames(site)
        rows = rows_of(site, self.rows)
        columns = site.tokens // rows
        low_grid = self.low_grid or (max(1, (4 * rows + 3) // 6), max(1, (4 * columns + 3) // 6))
        if len(low_grid) != 2 or not 1 <= low_grid[0] <= rows or not 1 <= low_grid[1] <= columns:
            raise ReductionError(
                f"`low_grid` takes rows+columns up to {rows}+{columns}; found {'+'.join(map(str, low_grid))}"
            )
        if self.keep_frames is not None and not 1 <= self.keep_frames <= site.frames:
            raise ReductionError(f"`keep_frames` must be in 1..{site.frames}; found {self.keep_frames}")
        plans = self._plans(site, low_grid[0] * low_grid[1])
        if self.highres is not None:
            most = self.keep_frames or site.frames
            if not 0 <= self.highres <= most:
                raise ReductionError(f"`highres` must be in 0..{most}, as so many frames stay; found {self.highres}")
            plans = {count: plan for count, plan in plans.items() if plan[1] == self.highres}
        keep = self.keep
        if keep is None and self.keep_ratio is None and self.highres is not None:
            keep = max(plans)
        keep = reachable(keep, self.keep_ratio, plans, site.total)
        frames, highres = plans[keep]
        known = replace(
            self, keep_frames=frames, highres=highres, low_grid=low_grid, rows=rows, keep=keep, keep_ratio=None
        )
        return PerClip.fit(known, site)

    def _plans(self, site: Site, low: int) -> dict[int, tuple[int, int]]:
        """Budget → how many frames stay, and how many of them in full."""
        most = self.keep_frames or site.frames
        least = self.keep_frames or -(-site.frames // 2)
        plans = {}
        for count in range(-(-least // CHANGE_WINDOW) * low, most * low):
            plans[count] = (max(least, -(-count // low)), 0)
        for highres in range(most + 1 if low < site.tokens else 1):
            plans[most * low + highres * (site.tokens - low)] = (most, highres)
        return plans

    def forward(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.keep_frames is not None and self.highres is not None
        assert self.low_grid is not None and self.rows is not None
        hidden = signals["hidden"]
        frames, patches = hidden.shape[1:3]
        grid, low_grid = (self.rows, patches // self.rows), (self.low_grid[0], self.low_grid[1])
        frame = spread(list(range(frames)), hidden)
        if self.keep_frames < frames:
            frame = _least_redundant(hidden, self.keep_frames)
            hidden, frames = take(hidden, frame), self.keep_frames
        low = pool(bilinear(grid, low_grid), hidden)
        cells = low.shape[2]

        # All tokens that may be wanted, `both` per frame: the full ones, then those of low resolution.
        both = patches + cells
        if 0 < self.highres < frames:
            wanted = _mixed(_relevant(low, signals, self.highres), patches, cells, self.keep)
        elif self.highres:
            wanted = spread([f * both + p for f in range(frames) for p in range(patches)], hidden)
        else:
            wanted = spread([f * both + p for f in range(frames) for p in range(patches, both)], hidden)
            if self.keep < frames * cells:
                wanted = take(wanted, _changed(low, self.keep))
        tokens = take(torch.cat([hidden, low], 2).flatten(1, 2), wanted)
        place = list(range(patches)) + [
            r * grid[1] + c for r in _middles(grid[0], low_grid[0]) for c in _middles(grid[1], low_grid[1])
        ]
        anchor = (frame * patches).unsqueeze(-1) + torch.tensor(place)
        size = torch.tensor([1.0] * patches + [patches / cells] * cells).expand_as(anchor)
        return Reduced(tokens, take(anchor.flatten(1), wanted), take(size.flatten(1), wanted))


def _least_redundant(hidden: Tensor, keep: int) -> Tensor:
    """int64 [batch, keep], ascending."""
    frames, scores, middle = hidden.shape[1], [], []
    for start in range(0, frames, FRAME_WINDOW):
        unit = normalize(hidden[:, start : start + FRAME_WINDOW].flatten(2))
        n = unit.shape[1]
        scores.append((unit @ unit.transpose(1, 2)).mean(-1))
        middle += [i == n // 2 for i in range(n)]
    return select(force(-snap(torch.cat(scores, 1)), torch.tensor(middle)), keep)


def _relevant(low: Tensor, signals: Signals, highres: int) -> Tensor:
    """bool [batch, frames]: the frames most relevant to the text."""
    mask = signals["text_mask"].float().unsqueeze(-1)
    text = (signals["text"].float() * mask).sum(1) / mask.sum(1).clamp(min=1)
    frame = low.float().mean(2)
    unit = (frame.pow(2).sum(-1).mean(-1) * text.pow(2).sum(-1)).sqrt().unsqueeze(-1).clamp(min=TINY)
    return placement(snap((frame @ text.unsqueeze(-1)).squeeze(-1), unit)) < highres


def _mixed(full: Tensor, patches: int, cells: int, keep: int) -> Tensor:
    """int64 [batch, keep]: the tokens to take, frame by frame. full: bool [batch, frames], whether all patches."""
    frames = full.shape[1]
    length = torch.where(full, patches, cells)
    earlier = torch.arange(frames)[None, :] < torch.arange(frames)[:, None]
    start = (length.unsqueeze(1) * earlier.to(torch.int64)).sum(-1)
    slot = torch.arange(keep)
    owner = (start.unsqueeze(1) <= slot.unsqueeze(-1)).to(torch.int64).sum(-1) - 1
    origin = torch.arange(frames) * (patches + cells) + torch.where(full, 0, patches)
    return take(origin - start, owner) + slot


def _changed(low: Tensor, keep: int) -> Tensor:
    """int64 [batch, keep]: places among all low-resolution tokens, ascending."""
    frames = low.shape[1]
    head = [f - f % CHANGE_WINDOW for f in range(frames)]
    unit = normalize(low)
    near = snap((unit * pick(unit, head)).sum(-1))
    is_head = torch.tensor([h == f for f, h in enumerate(head)]).unsqueeze(-1)
    return select(force(-near, is_head).flatten(1), keep)


def _middles(n: int, m: int) -> list[int]:
    """Of n entries, the one in the middle of each of m cells."""
    return [(2 * i + 1) * n // (2 * m) for i in range(m)]


METHOD = LongVU
