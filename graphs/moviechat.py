"""Average the most similar neighbouring frames, again and again, until few are left.

hidden [batch, frames, P, dim] → tokens [batch, keep_frames · P, dim], slot by slot, each in raster order; index int64
[batch, keep_frames · P] of the slot's first frame; size float32 [batch, keep_frames · P], the frames it stands for.

As long as there are more than `keep_frames`:
1. Two neighbouring frames are as similar as the mean over all pairs of their tokens of the dot product, which is the
   dot product of the frames' mean tokens.
2. The most similar neighbours, the earlier among equals, become one frame: at every place the plain average of the
   two.

That is one consolidation of the paper's short-term memory. Its long-term memory, fed with one such result after the
other while a stream runs, is the runtime's.

Source: Song et al. 2023, "MovieChat: From Dense Token to Sparse Memory for Long Video Understanding",
arXiv:2307.16449.
Knobs:
    keep_frames: frames left; the paper's 2 (of 18) if nothing is given.
    keep / keep_ratio: tokens over the whole clip instead; whole frames only.
Differs: the dot product is the official code's; the paper prints a cosine averaged over places. As in the code an
average weighs its two halves alike, however many frames each already holds. Works on the tower's tokens, where the
paper has 32 tokens of a Q-Former per frame. Steps are accumulated in float32, then cast back.
Position: *compact*, as a slot mixes frames; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._blocks import TINY, first, snap
from graphs._clip import rate, require_frames
from graphs._contract import OF_PROMPT, PerClip, Reduced, Signals, Site, Tier
from graphs._torch import torch

EXAMPLES = ("moviechat", "moviechat:keep_ratio=0.5")


@dataclass(frozen=True)
class MovieChat(PerClip):
    """Merge the most similar neighbouring frames until `keep_frames` are left."""

    paper: ClassVar[str] = "Song et al. 2023, arXiv:2307.16449"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    keep_frames: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> MovieChat:
        self.check()
        require_frames(site)
        counts = {n: n * site.tokens for n in range(1, site.frames + 1)}
        slots = rate("keep_frames", self.keep_frames, self.keep, self.keep_ratio, counts, site.total, default=2)
        return PerClip.fit(replace(self, keep_frames=slots, keep=counts[slots], keep_ratio=None), site)

    def after(self, site: Site) -> Site:
        assert self.keep_frames is not None
        return replace(site, frames=self.keep_frames, signals=site.signals & {"hidden", *OF_PROMPT})

    def forward(self, signals: Signals) -> Reduced:
        assert self.keep_frames is not None
        hidden = signals["hidden"]
        frames, patches = hidden.shape[1:3]
        mean = hidden.float().mean(2)
        product = mean @ mean.transpose(1, 2)  # [batch, frames, frames]
        unit = mean.pow(2).sum(-1).mean(-1, keepdim=True).clamp(min=TINY)
        # Every merge is linear: a slot is its row of weights over the frames that came in.
        weight = torch.eye(frames).expand(hidden.shape[0], -1, -1)
        size = torch.ones_like(hidden[:, :, 0, 0], dtype=torch.float32)
        for slots in range(frames - 1, self.keep_frames - 1, -1):
            near = ((weight[:, :-1] @ product) * weight[:, 1:]).sum(-1)
            at = first(snap(near, unit)).unsqueeze(-1)
            slot = torch.arange(slots)
            before, here = slot < at, slot == at
            left, right = size[:, :-1], size[:, 1:]
            size = torch.where(before, left, torch.where(here, left + right, right))
            low, high = weight[:, :-1], weight[:, 1:]
            before, here = before.unsqueeze(-1), here.unsqueeze(-1)
            weight = torch.where(before, low, torch.where(here, (low + high) / 2, high))
        tokens = (weight @ hidden.float().flatten(2)).unflatten(2, (patches, -1)).flatten(1, 2).to(hidden.dtype)
        earlier = torch.arange(self.keep_frames)[None, :] < torch.arange(self.keep_frames)[:, None]
        head = (size.unsqueeze(1) * earlier.float()).sum(-1).to(torch.int64)  # frames in the slots before
        index = head.unsqueeze(-1) * patches + torch.arange(patches)
        return Reduced(tokens, index.flatten(1), size.unsqueeze(-1).expand(-1, -1, patches).flatten(1))


METHOD = MovieChat
