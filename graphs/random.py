"""Keep tokens drawn at random: the control every method has to beat.

tokens [batch, frames · keep, dim] in raster order; index int64 [batch, frames · keep].

The draw happens when the graph is made, not when it runs (runtimes ignore random seeds): `seed` fixes it for
good, and every image, frame and sample loses the same tokens. With one seed a larger `keep` contains the
smaller one, so a curve over rates varies in one thing only.

Knobs: `keep` / `keep_ratio` per frame; `seed`; `space`: "tower", or "llm", behind a projector that takes whole rasters only.
Source: a control without a paper; strong in UniPruneBench and other comparisons.
Position: *keep*, the dropped tokens leave holes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from graphs._blocks import pick, spread
from graphs._contract import PerFrame, Reduced, Signals, Space

EXAMPLES = ("random:keep_ratio=0.25,seed=3",)


@dataclass(frozen=True)
class Random(PerFrame):
    """Keep the same randomly drawn tokens of every frame."""

    paper: ClassVar[str] = "control (fixed random choice)"

    seed: int = 0
    space: Space = "tower"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None
        hidden = signals["hidden"]
        # Only Random.random() is promised to give the same numbers in every Python version; sample() is not.
        draw = random.Random(self.seed)
        order = sorted((draw.random(), i) for i in range(hidden.shape[1]))
        index = sorted(i for _, i in order[: self.keep])
        return Reduced(pick(hidden, index), spread(index, hidden))


METHOD = Random
