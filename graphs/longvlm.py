"""Cut the clip into segments, merge the tokens of each by bipartite rounds, and put the clip's class tokens in front.

hidden [batch, frames, P, dim] → tokens [batch, keep, dim]: global tokens, then segment by segment; index int64
[batch, keep], -1 for a global token; size float32 [batch, keep].

1. *Local*: all tokens of a segment's frames, one after another, take part in rounds of bipartite matching: each even
   place merges into its most similar odd place (cosine), the mean weighted by size. Rounds halve the number as long
   as that leaves enough; the last one merges just as many of the best matches as are still too many. The paper's 2560
   tokens of 10 frames lose 1280, 640, 320, 160, 80, 40 and 10.
2. *Global*: the class token behind each of the tower's last blocks, averaged over all frames.

The metric of a round is the mean over the heads' slices of the tokens as merged so far.

Source: Weng et al. 2024, "LongVLM: Efficient Long Video Understanding via Large Language Models", ECCV 2024,
arXiv:2404.03384.
Knobs:
    segments: equal ones, so it divides the frames; by default the possible number nearest to one per 10 frames.
    keep / keep_ratio: tokens over the whole clip, global ones included; if neither is given, the paper's 30 per
        segment.
    global_tokens: the last so many blocks' class tokens; by default the paper's 5 at inference, 0 in towers without
        CLS.
    head_dim: width of a head's slice for the metric (64 in the paper's ViT-L); tokens of a width that it does not
        divide are compared whole.
    order: "paper": as the rounds leave them, a segment's unmatched even places before the odd ones; "raster": by
        anchor.
Differs: unmatched tokens of a round keep their order, where the official code sorts them by similarity. The paper's
projector is trained with this reduction, here any projector takes the tokens. Accumulated in float32, then cast back.
Position: *compact*: merged tokens have no place of their own; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._bipartite import match, merge
from graphs._blocks import ascending, rank, split, spread, take
from graphs._clip import reachable, require_frames, segments
from graphs._contract import PerClip, Reduced, ReductionError, Signals, Site, Tier
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("longvlm", "longvlm:keep_ratio=0.1,segments=4", "longvlm:keep=245,segments=2,order=raster")


@dataclass(frozen=True)
class LongVLM(PerClip):
    """Merge each segment's tokens, and add the clip's class tokens."""

    paper: ClassVar[str] = "Weng et al. 2024, arXiv:2404.03384"
    tier: ClassVar[Tier] = "trained"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    segments: int | None = None
    global_tokens: int | None = None
    global_blocks: tuple[int, ...] | None = None
    head_dim: int = 64
    order: Literal["paper", "raster"] = "paper"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", *(f"cls@{b}" for b in self.global_blocks or ()))

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> LongVLM:
        self.check()
        require_frames(site)
        cut = segments(site, "segments", self.segments, site.frames / 10)
        offered = sorted(int(b) for name, _, b in (s.partition("@") for s in site.signals) if name == "cls" and b)
        number = min(5, len(offered)) if self.global_tokens is None else self.global_tokens
        if number < 0 or number > len(offered):
            raise ReductionError(
                f"`global_tokens` = {number} needs the class token behind so many tower blocks; this model offers "
                f"{len(offered)}"
            )
        if self.head_dim < 1:
            raise ReductionError(f"`head_dim` must be at least 1; found {self.head_dim}")
        keep, tokens = self.keep, site.total // cut
        if keep is None and self.keep_ratio is None:
            keep = number + cut * min(30, tokens)
        counts = range(number + cut, site.total + 1, cut)
        keep = reachable(keep, self.keep_ratio, counts, site.total)
        blocks = tuple(offered[len(offered) - number :]) or None
        known = replace(self, segments=cut, global_tokens=number, global_blocks=blocks, keep=keep, keep_ratio=None)
        return PerClip.fit(known, site)

    def forward(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.segments is not None and self.global_tokens is not None
        hidden = signals["hidden"]
        frames, patches = hidden.shape[1:3]
        x = hidden.unflatten(1, (self.segments, -1)).flatten(2, 3).flatten(0, 1)  # [batch · segments, tokens, dim]
        tokens = frames * patches // self.segments
        out = self._merged(x, (self.keep - self.global_tokens) // self.segments)
        assert out.size is not None
        start = (torch.arange(self.segments) * tokens).unsqueeze(-1)
        parts = [
            split(out.tokens, self.segments),
            split(out.index, self.segments) + start,
            split(out.size, self.segments),
        ]
        x, index, size = (part.flatten(1, 2) for part in parts)
        if self.global_blocks:
            clip = torch.stack([signals[f"cls@{b}"].float().mean(1) for b in self.global_blocks], 1)
            x = torch.cat([clip.to(hidden.dtype), x], 1)
            index = torch.cat([spread([-1] * self.global_tokens, hidden), index], 1)
            size = torch.cat([torch.full_like(clip[..., 0], frames), size], 1)
        return Reduced(x, index, size)

    def _merged(self, x: Tensor, keep: int) -> Reduced:
        """Rounds of bipartite merging on [batch, n, dim], down to `keep` tokens."""
        dtype, n = x.dtype, x.shape[1]
        x, index, size = x.float(), spread(list(range(n)), x), torch.ones_like(x[..., 0], dtype=torch.float32)
        while n > keep:
            r = min(n // 2, n - keep)
            out = merge(x, size, match(self._metric(x), r))
            assert out.size is not None
            x, index, size, n = out.tokens, take(index, out.index), out.size, n - r
        if self.order == "raster":
            order = rank(index, n, largest=False)
            x, index, size = take(x, order), ascending(index), take(size, order)
        return Reduced(x.to(dtype), index, size)

    def _metric(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        return x if width % self.head_dim else x.unflatten(-1, (width // self.head_dim, self.head_dim)).mean(-2)


METHOD = LongVLM
