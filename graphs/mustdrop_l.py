"""Drop visual tokens at four layers by what the question looks at, but none that CLS looks at most.

hidden [batch, tokens, dim], text_attention [batch, text, tokens], instruction_mask [batch, text]; cls_attention@block [batch,
frames, entered], places [batch, tokens] → tokens [batch, kept, dim]; index int64 [batch, kept].

1. *Key tokens*: of every frame the ⌈key_ratio · tokens⌉ that CLS pays most attention in tower block `block`. They stay.
2. Behind each of a few layers a token is measured by the attention that the text behind the image pays it in that layer, mean over
   heads, in two ways. *Global*: its share of all that the text pays the tokens still there, summed over the text, against a
   threshold. *Individual*: the most that one text token pays it, against a threshold. Those that are ahead in either, each in units
   of its threshold, stay beside the key tokens, in raster order.
3. *Decoding*: what is left behind the last of these layers is all that the cache of the first of them, and of every layer behind
   it, holds of the image. The layers before keep everything.

Source: Liu et al. 2024, "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
arXiv:2411.10803: its second and third stage. The first is `mustdrop`; both together, that one first, are the whole method.
Knobs:
    layer_list: layers (0-based) before which tokens are dropped. By default 3, 7, 11 and 15 of 32, at the same parts of the depth,
        in a model of fewer layers fewer of them: the paper drops what comes out of layers 2, 6, 10 and 14.
    keep_list: visual tokens left after each of them, over all frames, key tokens included.
    keep / keep_ratio: tokens left after the last one. Of those that are not key tokens the same part stays at every stage, by
        default 0.59. The paper names its settings by a mean over the layers, as its code counts (a layer has what it hands on):

        paper    of 576
        192      359, 231, 156, 111    if nothing is given
        128      256, 130, 80, 60      keep=60
        64       54, 36, 36, 36        keep_list=54+36+36+36 behind mustdrop:keep=448; 576 and 47 key tokens alone are more

    ratio: of the global threshold to the individual one. The paper's are 0.001 for both for 192 tokens, 0.0012 and 0.001 for 128,
        0.011 and 0.01 for 64.
    key_ratio: 0 does without key tokens, where the tower has no CLS or something else acted behind it.
    block: by default the last one that can be asked, as in the paper (23 of CLIP-L).
Differs: the paper drops tokens that are below both thresholds, however many that are; here the thresholds move together until the
counts are met, and how these fall from stage to stage is ours, as the paper tells means only. In the official code a later token is
rotated by the length of the shortened cache, though in the layers of which keys left the cache the others stay rotated as they
were, so it may stand before the end of the question; here it stands behind the prompt as every layer counted it. Equal scores go to
the earlier token.
Position: *compact*: later layers renumber everything without gaps, as in the official code; *keep* on t/h/w grids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import TINY, force, one_hot, rank, select, snap, take
from graphs._contract import Reduced, ReductionError, Signals, Site, Tier
from graphs._layers import Staged, layers_of
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("mustdrop_l", "mustdrop_l:layer_list=2+4,keep=64,ratio=1.2", "mustdrop_l:keep_ratio=0.2,key_ratio=0")

PAPER = (3, 7, 11, 15)
STAYS = 0.59
"""Of the tokens that are no key tokens, at every stage."""


@dataclass(frozen=True)
class MustDropL(Staged):
    """Keep the key tokens and what the question looks at, and nothing else in most of the cache."""

    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2411.10803"
    tier: ClassVar[Tier] = "fixed budget"
    everywhere: ClassVar[bool] = True
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    ratio: float = 1.0
    key_ratio: float = 0.08
    block: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        block = "last" if self.block is None else self.block
        return ("text_attention", "instruction_mask", *(["places", f"cls_attention@{block}"] if self.key_ratio else []))

    @property
    def since(self) -> int:
        return self.layers[0] - 1

    def fit(self, site: Site) -> MustDropL:
        self.check()
        if not 0 <= self.ratio < math.inf:
            raise ReductionError(f"`ratio` is at least 0; found {self.ratio:g}")
        if not 0 <= self.key_ratio <= 1:
            raise ReductionError(f"`key_ratio` is a share of a frame's tokens, in 0..1; found {self.key_ratio:g}")
        layers = layers_of(site, "layer_list", self.layer_list, PAPER[: max(1, site.depth - 1)])
        keys = site.frames * self._keys(site.tokens)
        fitted = replace(self, block=self._block(site)).resolve(site, layers, self._counts(site, len(layers), keys))
        if fitted.kept(layers[-1]) < keys:
            raise ReductionError(
                f"the {keys} key tokens always stay, so `keep` must be in {keys}..{site.total}; found "
                f"{fitted.kept(layers[-1])}. Keep more, or make `key_ratio` smaller"
            )
        return fitted

    def _block(self, site: Site) -> int | None:
        """The tower block whose CLS is asked."""
        if not self.key_ratio:
            return None
        offered = [int(name.partition("@")[2]) for name in site.signals if name.startswith("cls_attention@")]
        if not offered:
            raise ReductionError(
                "it needs what CLS attends to in a block of the tower (`cls_attention@…`): a tower with CLS, whose tokens enter the "
                "language model as they are, and no others; `key_ratio=0` does without key tokens"
            )
        return max(offered) if self.block is None else self.block

    def _counts(self, site: Site, stages: int, keys: int) -> tuple[int, ...]:
        rest, last = site.total - keys, self.last(site)
        part = STAYS if last is None else (max(0, last - keys) / max(1, rest)) ** (1 / stages)
        counts = [max(1, keys + math.floor(rest * part ** (stage + 1) + 0.5)) for stage in range(stages)]
        return tuple(counts) if last is None else (*counts[:-1], last)

    def _keys(self, tokens: int) -> int:
        """Of a frame of so many."""
        return math.ceil(round(self.key_ratio * tokens, 9))

    def forward(self, layer: int, signals: Signals) -> Reduced:
        rows, mask = signals["text_attention"].float(), signals["instruction_mask"].float()
        asked = rows * mask.unsqueeze(-1)
        total = asked.sum(1)
        share = total / total.sum(-1, keepdim=True).clamp(min=TINY)
        score = snap(torch.maximum(share, self.ratio * asked.amax(1)), 1 / rows.shape[-1])
        if self.key_ratio:
            score = force(score, take(self.key_tokens(signals[self.of_tower[0]]), signals["places"]) > 0)
        index = select(score, self.kept(layer))
        return Reduced(take(signals["hidden"], index), index)

    def key_tokens(self, seen: Tensor) -> Tensor:
        """float32 [batch, entered]: 1 for key tokens.

        Args:
            seen: [batch, frames, tokens], the attention of CLS.
        """
        tokens = seen.shape[-1]
        best = rank(snap(seen, 1 / tokens), self._keys(tokens))
        return one_hot(best, tokens, torch.float32).sum(-2).flatten(1)


METHOD = MustDropL
