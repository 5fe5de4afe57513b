"""Drop visual tokens twice inside the language model, by attention without positions and a coarse grid of the image.

hidden [batch, tokens, dim], plain_row [batch, tokens] → tokens [batch, kept, dim]; index int64 [batch, kept].

A visual token's score is the attention that the last prompt token pays it in the layer before, without RoPE (whose decay
favours the bottom of the image), softmax over visual tokens only, averaged over heads.
1. Before the first layer of `layer_list` there stay all tokens in every `stride`-th row and column of each frame, and
   the best of the others.
2. Before the second one the best of the tokens present stay.
Raster order throughout.

Source: Endo et al. 2024, "Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model
Acceleration", arXiv:2412.13180.
Knobs:
    layer_list: two layers (0-based) before which tokens are dropped. By default the paper's 8 and 16 of 32, at the same
        parts of the depth.
    stride: of the grid. raster: rows and columns of a frame, as 24+24; by default the site's.
    second: what the second stage keeps a share of: the tokens that are "present" there, as in the official code, or
        "all" tokens of the image, as the paper reads.
    keep_list: visual tokens left after both, over all frames. By default from the share r = 0.3: ⌊r · all⌋ and
        (1 - r) · grid, then ⌊r² · present (or all)⌋.
    keep / keep_ratio: tokens left after the second stage; r follows.
    rope: on scores with position, as `fastv` does.
Differs: the paper's first stage keeps the best ⌊r · all⌋ and the grid, however many tokens these are together; ours
counts on the best being spread evenly, so that 1 - r of the grid is not among them, and takes a few more or fewer of
the best. Equal scores go to the earlier token.
Position: *keep*: kept tokens keep their ids, holes stay, as in the official code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._blocks import force, select, snap, take
from graphs._contract import Reduced, ReductionError, Signals, Site, Tier
from graphs._groups import raster_of
from graphs._layers import Staged, layers_of
from graphs._torch import torch

EXAMPLES = ("feather", "feather:keep=64,second=all", "feather:layer_list=1+3,stride=2,keep_list=200+20")

RATIO = 0.3
"""The paper's r."""

EPSILON = 1e-9
"""A product this near below a whole number is that number."""


@dataclass(frozen=True)
class Feather(Staged):
    """Keep the best tokens and a grid, then the best."""

    paper: ClassVar[str] = "Endo et al. 2024, arXiv:2412.13180"
    tier: ClassVar[Tier] = "fixed budget"

    stride: int = 3
    raster: tuple[int, ...] | None = None
    second: Literal["present", "all"] = "present"
    rope: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("attention_row" if self.rope else "plain_row",)

    def fit(self, site: Site) -> Feather:
        self.check()
        if self.stride < 1:
            raise ReductionError(
                f"`stride` is every how many rows and columns the grid has, at least 1; found {self.stride}"
            )
        layers = layers_of(site, "layer_list", self.layer_list, (8, 16))
        if len(layers) != 2:
            raise ReductionError(f"`layer_list` needs two layers; found {'+'.join(map(str, layers))}")
        known = replace(self, raster=raster_of(site, self.raster))
        fitted = known.resolve(site, layers, known._counts(site))
        grid = sum(known._on_grid(site.total))
        if fitted.kept(layers[0]) < grid:
            raise ReductionError(
                f"the grid of stride {self.stride} has {grid} tokens, so the first count of `keep_list` must be in "
                f"{grid}..{site.total}; found {fitted.kept(layers[0])}"
            )
        return fitted

    def _counts(self, site: Site) -> tuple[int, int]:
        n, grid = site.total, sum(self._on_grid(site.total))

        def first(ratio: float) -> int:
            return max(grid, math.floor(ratio * n + EPSILON) + math.floor((1 - ratio) * grid + 0.5))

        last = self.last(site)
        if last is None:
            of = first(RATIO) if self.second == "present" else n
            return first(RATIO), max(1, math.floor(RATIO**2 * of + EPSILON))
        low, high = 0.0, 1.0  # around the r whose second stage keeps `last`
        for _ in range(50):
            r = (low + high) / 2
            of_r = r * n + (1 - r) * grid if self.second == "present" else n
            low, high = (r, high) if r**2 * of_r < last else (low, r)
        return max(last, first(high)), last

    def _on_grid(self, total: int) -> list[bool]:
        """Whether a token lies on the grid of its frame, for all tokens."""
        assert self.raster is not None
        rows, cols = self.raster
        return [i // cols % rows % self.stride == 0 and i % cols % self.stride == 0 for i in range(total)]

    def forward(self, layer: int, signals: Signals) -> Reduced:
        (row,) = (signals[name] for name in self.needs)
        score = snap(row, 1 / row.shape[-1])
        if layer == self.layers[0]:
            score = force(score, torch.tensor(self._on_grid(row.shape[-1])))
        index = select(score, self.kept(layer))
        return Reduced(take(signals["hidden"], index), index)


METHOD = Feather
