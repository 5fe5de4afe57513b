"""Keep every n-th frame of a clip, whole.

hidden [batch, frames, P, dim] → tokens [batch, slots · P, dim] with slots = ⌈frames / every⌉; index int64
[batch, slots · P].

Frames 0, n, 2n, … stay, the others go. In the paper a trained temporal module in front has spread what happens in
time over all frames, so that little is lost; without one this is plain temporal subsampling behind the tower, the
control for methods that choose their frames.

Source: Jiang et al. 2025, "Token-Efficient Long Video Understanding for Multimodal LLMs" (STORM), arXiv:2503.04130:
its training-free test-time sampling.
Knobs:
    every: n; 2 if nothing is given.
    keep / keep_ratio: tokens over the whole clip instead; whole frames only.
Differs: the paper's bidirectional Mamba layer before the sampling is trained and no part of this. Its average pooling
over time or space is a training-time alternative to the sampling.
Position: *keep*: a kept frame keeps its place in time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from graphs._blocks import spread
from graphs._clip import rate, require_frames
from graphs._contract import OF_PROMPT, PerClip, Reduced, Signals, Site, Tier

EXAMPLES = ("storm:every=4", "storm:keep_ratio=0.5")


@dataclass(frozen=True)
class Storm(PerClip):
    """Keep every n-th frame."""

    paper: ClassVar[str] = "Jiang et al. 2025, arXiv:2503.04130"
    tier: ClassVar[Tier] = "trained"

    every: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    def fit(self, site: Site) -> Storm:
        self.check()
        require_frames(site)
        counts = {n: -(-site.frames // n) * site.tokens for n in range(1, site.frames + 1)}
        every = rate("every", self.every, self.keep, self.keep_ratio, counts, site.total, default=2)
        return PerClip.fit(replace(self, every=every, keep=counts[every], keep_ratio=None), site)

    def after(self, site: Site) -> Site:
        assert self.every is not None
        return replace(site, frames=-(-site.frames // self.every), signals=site.signals & {"hidden", *OF_PROMPT})

    def forward(self, signals: Signals) -> Reduced:
        assert self.every is not None
        hidden = signals["hidden"]
        frames, patches = hidden.shape[1:3]
        index = [f * patches + p for f in range(0, frames, self.every) for p in range(patches)]
        return Reduced(hidden[:, :: self.every].flatten(1, 2), spread(index, hidden))


METHOD = Storm
