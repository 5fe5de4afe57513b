"""Drop visual tokens stage by stage as the language model gets deeper, by what the next layer would look at.

hidden [batch, tokens, dim], next_row [batch, tokens] → tokens [batch, kept, dim]; index int64 [batch, kept].

Before each of a few decoder layers the visual tokens still present are ranked by the attention that the last prompt
token would pay them in that very layer (its own norm and projections applied to what enters it, softmax over the whole
sequence, averaged over heads); the best stay, in raster order. Earlier layers, and their part of the cache, hold more.

Source: Xing et al. 2024, "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction", arXiv:2410.17247.
Knobs:
    layer_list: layers (0-based) before which tokens are dropped, ascending, as in the official scripts. By default the
        paper's 8, 16 and 24 of 32, at the same parts of the depth.
    keep_list: visual tokens left after each of them, over all frames. By default λ = 1/2: half of all, a quarter, an
        eighth, …, rounded down.
    keep / keep_ratio: tokens left after the last stage; the others follow with one λ, rounded half up.
    rope: off scores without position: the same attention from queries and keys that are not rotated.
Differs: equal scores go to the earlier token. While it trains the paper asks the last token in front of every answer;
here there is one prompt.
Position: *compact*: in later layers everything is renumbered without gaps, as in the official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from graphs._blocks import select, snap, take
from graphs._contract import Reduced, Signals, Site, Tier
from graphs._layers import Staged, counts_of, layers_of

EXAMPLES = ("pdrop", "pdrop:layer_list=2+4,keep=48", "pdrop:keep_ratio=0.25,rope=off")


@dataclass(frozen=True)
class PyramidDrop(Staged):
    """Keep the tokens with the most attention from the last prompt token, fewer at every stage."""

    paper: ClassVar[str] = "Xing et al. 2024, arXiv:2410.17247"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    rope: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("next_row" if self.rope else "next_plain_row",)

    def fit(self, site: Site) -> PyramidDrop:
        self.check()
        layers = layers_of(site, "layer_list", self.layer_list, (8, 16, 24))
        last, parts = self.last(site), [2.0 ** -(stage + 1) for stage in range(len(layers))]
        if last is None:
            return self.resolve(site, layers, tuple(max(1, int(site.total * part)) for part in parts))
        return self.resolve(site, layers, counts_of(site, last, [tuple(site.total * part for part in parts)]))

    def forward(self, layer: int, signals: Signals) -> Reduced:
        (row,) = (signals[name] for name in self.needs)
        index = select(snap(row, 1 / row.shape[-1]), self.kept(layer))
        return Reduced(take(signals["hidden"], index), index)


METHOD = PyramidDrop
