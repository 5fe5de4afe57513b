"""Thin out a clip in time by merging, in space by pruning.

hidden [batch, frames, P, dim] → tokens [batch, slots · keep, dim], slot by slot, each in raster order; index
int64 [batch, slots · keep] into the flattened frames, of a merged token the earliest it holds, -1 for CLS;
size float32 [batch, slots · keep], the frames a token stands for.

*Temporal* (`keep_frames` of T frames stay, at every place p on its own). A token is redundant if it hardly
differs from the one at its place in the frame before, by
    differential: the mean over channels of |Z[i, p] - Z[i-1, p]|;
    similarity: -cos(Z[i, p], Z[i-1, p]).
The T - keep_frames tokens lowest by this measure merge into what precedes them, a run of such tokens into one
mean. The first frame always heads a run; of equal tokens the earlier heads one. Every place ends up with
`keep_frames` tokens, so slot j may hold different frames at different places.

*Spatial* (`keep` of P tokens stay, in every slot on its own), best first by
    topic: cos(Z[i, p], CLS_i);
    text: the mean over the prompt's text tokens of Z[i, p] · E_j, in the language model's space, padding
        masked.

Temporal comes first. Either may be used alone.

Source: Zhao et al. 2025, "LFTR: Learning-Free Token Reduction for Multimodal Large Language Models",
arXiv:2501.17391.
Knobs:
    temporal, spatial: the measure, or none.
    keep_frames: the paper's (1 - r_m) · T. keep / keep_ratio: its (1 - r_p) · P, per slot.
    cls: pass CLS on, as a token in front of its slot which `keep` counts. The paper does (8 frames are 8 ×
        257 tokens). Then CLS competes like any token: under topic it always survives, as cos(CLS, CLS) = 1;
        under text it may not. Off by default, as most language models were trained without it.
CLS is a place of its own for temporal merging, whether it is passed on or only used for topic: slot j is
judged by the j-th merged CLS.
Differs, where the paper leaves it open: the mean of a run is over all its tokens alike, not pairwise along
the chain; the difference is L1 (divided by dim, which cannot change the order). Merging is accumulated in
float32, then cast back.
Position: *compact*, as a slot mixes frames; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import normalize, select, snap, split, take
from graphs._contract import BeforeLLM, Reduced, ReductionError, Signals, Site, Space, Tier, keep_count
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = (
    "lftr:temporal=similarity,keep_frames=4,spatial=topic,keep=64",
    "lftr:temporal=differential,keep_frames=4",
    "lftr:spatial=text,keep_ratio=0.25,cls=on",
)

SWEEP = "lftr:spatial=topic,keep_ratio={ratio}"

TINY = 1e-12


@dataclass(frozen=True)
class Lftr(BeforeLLM):
    """Merge frames that hardly change, then keep the tokens closest to CLS or to the text."""

    paper: ClassVar[str] = "Zhao et al. 2025, arXiv:2501.17391"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    temporal: Literal["differential", "similarity"] | None = None
    keep_frames: int | None = None
    spatial: Literal["topic", "text"] | None = None
    keep: int | None = None
    keep_ratio: float | None = None
    cls: bool = False

    @property
    def space(self) -> Space:
        return "llm" if self.spatial == "text" else "tower"

    @property
    def needs(self) -> tuple[str, ...]:
        cls = ("cls",) if self.cls or self.spatial == "topic" else ()
        return ("hidden", *cls, *(("text", "text_mask") if self.spatial == "text" else ()))

    @property
    def passes_cls(self) -> bool:
        return self.cls

    @property
    def merges(self) -> bool:
        return self.temporal is not None

    def fit(self, site: Site) -> Lftr:
        self.check()
        if self.temporal is None and self.spatial is None:
            raise ReductionError(
                "give `temporal` (differential or similarity) with `keep_frames`, `spatial` (topic or text) "
                "with `keep`, or both; found neither"
            )
        known = replace(self, position=self.resolved_position(site))
        known = replace(known._fit_temporal(site), keep_ratio=None)
        known = known._fit_spatial(site, self.keep_ratio)
        known.require(site)
        return known

    def _fit_temporal(self, site: Site) -> Lftr:
        if self.temporal is None:
            if self.keep_frames not in (None, site.frames):
                raise ReductionError(
                    f"`keep_frames` = {self.keep_frames} needs `temporal` (differential or similarity); found none"
                )
            return replace(self, keep_frames=site.frames)
        if site.frames < 2:
            raise ReductionError(
                f"`temporal` = {self.temporal} merges frames of a clip, so it needs at least 2; found {site.frames}"
            )
        if self.keep_frames is None or not 1 <= self.keep_frames <= site.frames:
            raise ReductionError(
                f"`temporal` = {self.temporal} needs `keep_frames` in 1..{site.frames}, as there are "
                f"{site.frames} frames; found {'none' if self.keep_frames is None else self.keep_frames}"
            )
        return self

    def _fit_spatial(self, site: Site, keep_ratio: float | None) -> Lftr:
        capacity = site.tokens + self.cls
        if self.spatial is not None:
            return replace(self, keep=keep_count(self.keep, keep_ratio, capacity, what="tokens per frame"))
        if self.keep not in (None, capacity) or keep_ratio is not None:
            given = f"`keep` = {self.keep}" if keep_ratio is None else f"`keep_ratio` = {keep_ratio:g}"
            raise ReductionError(f"{given} needs `spatial`: topic or text; found none")
        return replace(self, keep=capacity)

    def after(self, site: Site) -> Site:
        assert self.keep is not None and self.keep_frames is not None
        raster = self.keep == site.tokens and not self.cls
        signals = site.signals & {"hidden", "text", "text_mask"}
        if self.keep_frames == site.frames:
            signals |= site.signals & {"cls"}
        return replace(
            site,
            tokens=self.keep,
            frames=self.keep_frames,
            grid=site.grid if raster else None,
            signals=signals,
        )

    def forward(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.keep_frames is not None
        z = signals["hidden"]
        frames, patches = z.shape[1:3]
        front = 1 if "cls" in self.needs else 0  # CLS takes place 0, whether it is passed on or only used
        if front:
            z = torch.cat([signals["cls"].unsqueeze(2), z], 2)
        head = (torch.arange(frames)[:, None] + torch.zeros(front + patches, dtype=torch.int64)).expand(
            z.shape[0], -1, -1
        )
        size = torch.ones_like(z[..., 0], dtype=torch.float32)
        slots = self.keep_frames
        if slots < frames:
            by_place = z.transpose(1, 2).float()
            mean, head, size = _merge_runs(by_place, self._change(by_place) if slots > 1 else None, slots)
            z = mean.to(z.dtype)
        topic = z[:, :, :1]
        skip = front - int(self.cls)
        z, head, size = (x[:, :, skip:].flatten(0, 1) for x in (z, head, size))  # [batch * slots, places, …]
        n = patches + int(self.cls)
        place = torch.arange(n).expand(z.shape[0], -1)
        if self.keep < n:
            place = select(self._relevance(split(z, slots), topic, signals).flatten(0, 1), self.keep)
            z, head, size = (take(x, place) for x in (z, head, size))
        index = head * patches + place
        if self.cls:
            index = torch.where(place > 0, index - 1, torch.full((), -1, dtype=torch.int64))
        tokens, index, size = (split(x, slots).flatten(1, 2) for x in (z, index, size))
        return Reduced(tokens, index, size)

    def _change(self, z: Tensor) -> Tensor:
        """Snapped [batch, places, frames - 1]: how much a token differs from its predecessor.

        Args:
            z: float32 [batch, places, frames, dim].
        """
        if self.temporal == "similarity":
            # All products of a place's frames in one MatMul: more than are needed, but `z` is read only once.
            product = z @ z.transpose(-1, -2)
            same = torch.eye(z.shape[2])
            length = ((product * same).sum(-1) + TINY).sqrt()
            near = (product[:, :, 1:] * same[:-1]).sum(-1)
            return snap(-near / (length[..., 1:] * length[..., :-1]))
        scale = z.abs().mean((1, 2, 3), keepdim=True).squeeze(-1) + TINY
        return snap((z[:, :, 1:] - z[:, :, :-1]).abs().mean(-1), scale)

    def _relevance(self, z: Tensor, topic: Tensor, signals: Signals) -> Tensor:
        """Snapped [batch, slots, places]: the spatial score."""
        if self.spatial == "topic":
            z = z.float()
            length = (z.pow(2).sum(-1) + TINY).sqrt()
            return snap((z @ normalize(topic).transpose(-1, -2)).squeeze(-1) / length)
        mask = signals["text_mask"].float().unsqueeze(-1)
        text = (signals["text"].float() * mask).sum(1) / mask.sum(1).clamp(min=1)
        z = z.float()
        scale = (z.pow(2).sum(-1).mean((1, 2)) * text.pow(2).sum(-1)).sqrt()[:, None, None] + TINY
        return snap((z * text[:, None, None]).sum(-1), scale)


def _merge_runs(z: Tensor, change: Tensor | None, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per place, cut the frames into `slots` runs before the largest changes, and take the mean of each run.

    Args:
        z: float32 [batch, places, frames, dim]. change: [batch, places, frames - 1], None if there is one run only.
    Returns:
        tokens float32 [batch, slots, places, dim], head int64 [batch, slots, places] (first frame of the run), size
        float32.
    """
    frames = z.shape[2]
    zero = torch.zeros_like(z[:, :, :1, 0], dtype=torch.int64)  # [batch, places, 1]
    head = zero
    if change is not None:
        head = torch.cat([zero, select(change, slots - 1) + 1], -1)
    end = torch.cat([head[..., 1:], zero + frames], -1)
    time = torch.arange(frames)
    run = ((head.unsqueeze(-1) <= time) & (time < end.unsqueeze(-1))).to(
        torch.float32
    )  # [batch, places, slots, frames]
    size = run.sum(-1)
    mean = (run / size.unsqueeze(-1)) @ z
    return mean.transpose(1, 2), head.transpose(1, 2), size.transpose(1, 2)


METHOD = Lftr
