"""Keep the tokens that stand out against the question, and one mean of all others.

tokens [batch, frames · keep, dim], per frame in raster order with the mean at the end; index int64
[batch, frames · keep], of the mean the last token in it; size float32 [batch, frames · keep].

1. Each token's similarity to the question.
2. The `keep` - 1 tokens that it ranks first, of equals the earlier, stay as they are.
3. The mean of the others is appended.

Source: Song et al. 2024, "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs"
(TRIM), COLING 2025, arXiv:2409.10994.
Knobs (per frame; per tile in multi-tile models):
    keep / keep_ratio: all tokens that leave, the mean among them. The paper's rule for images of which about 21 %
        stay, outliers by the interquartile range, gives no fixed count.
    text: where the question is met: "clip", in the space a CLIP tower shares with its text (dot product), "llm",
        behind the projector, among the prompt's embeddings (cosine to their masked mean), or "auto": clip where there
        is one.
    sign: which similarity stays, "lowest" or "highest". "auto": lowest in clip, as the official code negates (patches
        of CLIP score inverted, although the paper speaks of the highest), highest in llm.
Differs: the softmax over tokens is left out, as it cannot change the order; "llm" is ours; the mean is accumulated in
float32, then cast back.
Position: *compact*: the language model gets a shorter sequence; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import TINY, complement, normalize, select, snap, spread, take
from graphs._contract import PerFrame, Reduced, Signals, Site, Space, Tier
from graphs._text import Meeting, mean_text, needs, resolved
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("trim:keep=64", "trim:keep_ratio=0.25,text=llm,sign=lowest")


@dataclass(frozen=True)
class Trim(PerFrame):
    """Keep what stands out against the question, and the mean of the rest."""

    tier: ClassVar[Tier] = "fixed budget"
    paper: ClassVar[str] = "Song et al. 2024, arXiv:2409.10994"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    text: Meeting = "auto"
    sign: Literal["auto", "lowest", "highest"] = "auto"

    @property
    def space(self) -> Space:
        return "llm" if self.text == "llm" else "tower"

    @property
    def needs(self) -> tuple[str, ...]:
        """With `text` still at "auto": what the paper needs."""
        return ("hidden", *needs(self.text))

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> Trim:
        self.check()
        text = resolved(self.text, site)
        sign = self.sign if self.sign != "auto" else "lowest" if text == "clip" else "highest"
        return PerFrame.fit(replace(self, text=text, sign=sign), site)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None
        hidden = signals["hidden"]
        n = hidden.shape[1]
        if self.keep == 1:
            return _mean(hidden, spread(list(range(n)), hidden))
        if self.text == "clip":
            x, question = signals["aligned"].float(), signals["aligned_text"].float()
            scale = (x.pow(2).sum(-1).mean(-1) * question.pow(2).sum(-1)).sqrt().unsqueeze(-1) + TINY
            similarity = snap((x @ question.unsqueeze(-1)).squeeze(-1), scale)
        else:
            similarity = snap((normalize(hidden) @ normalize(mean_text(signals)).unsqueeze(-1)).squeeze(-1))
        index = select(-similarity if self.sign == "lowest" else similarity, self.keep - 1)
        mean, anchor, rest = _mean(hidden, complement(index, n))
        assert rest is not None
        size = torch.cat([torch.ones_like(index, dtype=torch.float32), rest], 1)
        return Reduced(torch.cat([take(hidden, index), mean], 1), torch.cat([index, anchor], 1), size)


def _mean(hidden: Tensor, index: Tensor) -> Reduced:
    """One token: the mean of those at `index` [batch, m]."""
    mean = take(hidden, index).float().mean(1, keepdim=True).to(hidden.dtype)
    last = index[:, -1:]
    return Reduced(mean, last, torch.full_like(last, index.shape[1], dtype=torch.float32))


METHOD = Trim
