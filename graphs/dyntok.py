"""Merge runs of like neighbours in every row of the raster.

tokens [batch, keep, dim] in raster order, frame by frame; index int64 [batch, keep], the first token of a run; size
float32 [batch, keep], its length.

1. Every token is compared (cosine) with its left neighbour. The first of a row always starts a run.
2. The tokens least like their left neighbour start runs too, of equals the earlier, until there are `keep` runs.
3. Each run becomes the mean of its tokens.

Source: Zhang et al. 2025, "DynTok: Dynamic Compression of Visual Tokens for Efficient and Effective Video
Understanding", arXiv:2506.03990.
Knobs:
    keep / keep_ratio: runs over all frames, at least one per row.
    budget: "clip": one budget over all frames, so that busy frames get more runs, as the paper's threshold has it;
        "frame": the same number of runs in every frame, which must then divide `keep`.
    rows: rows of the raster, by default the site's.
Differs: the paper joins neighbours with a cosine above 0.6, which leaves 44 % of the tokens on average; here the count
is fixed and the threshold follows. Merging is accumulated in float32, then cast back.
Position: *compact*: the language model gets a shorter sequence; *keep* on t/h/w grids, that of the first token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._blocks import force, normalize, one_hot, select, snap, split, take
from graphs._contract import PerClip, Reduced, ReductionError, Signals, Site, Space, Tier, keep_count
from graphs._groups import rows_of
from graphs._torch import torch

EXAMPLES = ("dyntok:keep=256", "dyntok:keep_ratio=0.444,budget=frame", "dyntok:keep=20")


@dataclass(frozen=True)
class DynTok(PerClip):
    """Merge runs of like neighbours in every row."""

    tier: ClassVar[Tier] = "fixed budget"
    paper: ClassVar[str] = "Zhang et al. 2025, arXiv:2506.03990"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    budget: Literal["clip", "frame"] = "clip"
    rows: int | None = None

    @property
    def space(self) -> Space:
        return "llm"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> DynTok:
        self.check()
        rows, frames = rows_of(site, self.rows), site.frames
        if self.budget == "frame" and self.keep is None:
            keep = frames * keep_count(None, self.keep_ratio, site.tokens)
        else:
            keep = keep_count(self.keep, self.keep_ratio, site.total, what=f"tokens in {frames} frames")
        if self.budget == "frame" and keep % frames:
            raise ReductionError(
                f"`budget` = frame gives each of {frames} frames the same share; found `keep` = {keep}"
            )
        if keep < rows * frames:
            raise ReductionError(
                f"`keep` must be at least {rows * frames}, as every one of the {rows} rows of {frames} frames starts a "
                f"run; found {keep}"
            )
        return PerClip.fit(replace(self, rows=rows, keep=keep, keep_ratio=None), site)

    def forward(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.rows is not None
        hidden = signals["hidden"]
        frames, n = hidden.shape[1:3]
        total, columns = frames * n, n // self.rows
        unit = normalize(hidden).flatten(1, 2)
        like_left = snap((unit[:, 1:] * unit[:, :-1]).sum(-1))
        like_left = torch.cat([torch.zeros_like(like_left[:, :1]), like_left], 1)
        score = force(-like_left, torch.arange(total) % columns == 0)
        if self.budget == "frame":
            start = split(select(score.reshape(-1, n), self.keep // frames), frames)
            start = (start + torch.arange(frames).unsqueeze(-1) * n).flatten(1)
        else:
            start = select(score, self.keep)
        # Runs lie within rows: number them there, and every token finds the mean of its run.
        begins = one_hot(start, total, torch.float32).sum(1).reshape(-1, total // columns, columns)
        run = begins @ torch.ones(columns, columns).triu()
        same = (run.unsqueeze(-1) == run.unsqueeze(-2)).to(torch.float32)  # [batch, rows, columns, columns]
        length = same.sum(-1)
        x = hidden.reshape(-1, total // columns, columns, hidden.shape[-1])
        mean = ((same / length.unsqueeze(-1)) @ x.float()).to(hidden.dtype)
        return Reduced(take(mean.flatten(1, 2), start), start, take(length.flatten(1), start))


METHOD = DynTok
