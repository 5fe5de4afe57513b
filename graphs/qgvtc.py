"""Keep the tokens that correlate with the question and share the others out among them, in stages.

tokens [batch, frames · keep, dim] in raster order; index int64 [batch, frames · keep], the kept token; size float32
[batch, frames · keep], which a share need not leave whole.

The question is the mean of the prompt's text tokens, padding left out, brought into the tower's space by a trained
feed-forward layer: W₂ · max(0, W₁ · mean + b₁) + b₂. In each stage:
1. The tokens whose cosine to the question is largest are kept, of equals the earlier.
2. *Soft compression*: each other token is shared out among the kept ones by attention, a softmax over them of
   √dim · cosine (tokens of unit root mean square as queries and keys). A kept token becomes the mean of itself and the
   shares it gets, weighted by size.
The counts of the stages fall geometrically to `keep`: 576 → 288 → 144 → 72.

Source: Li et al. 2025, "QG-VTC: Question-Guided Visual Token Compression in MLLMs for Efficient VQA",
arXiv:2504.00654; there are no official code and weights.
Knobs (per frame):
    keep / keep_ratio: tokens that leave the last stage.
    stages: how many there are.
    weights: safetensors file with the trained layer: question_in [LLM width, dim], question_in_bias [dim], question_out
        [dim, dim], question_out_bias [dim]; dim is the tower's width. Without it tokens and question are compared
        behind the projector, in the language model's space, where both live without training.
Differs: the paper compresses between deep tower blocks and trains the tower along; here all stages come after the tower.
It takes the tower's attention with its trained projections, here it is that of the tokens themselves, and a text encoder
of its own, here it is the language model's embeddings. The mode without weights is ours.
Position: *compact*: the language model gets a shorter sequence; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import complement, normalize, select, snap, spread, take
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Space, Tier
from graphs._text import mean_text
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("qgvtc:keep=72", "qgvtc:keep_ratio=0.25,stages=1")


@dataclass(frozen=True)
class QgVtc(PerFrame):
    """Keep what the question asks for and share out the rest."""

    tier: ClassVar[Tier] = "trained"
    paper: ClassVar[str] = "Li et al. 2025, arXiv:2504.00654"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    stages: int = 3
    weights: str | None = None

    @property
    def space(self) -> Space:
        return "llm" if self.weights is None else "tower"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "text", "text_mask")

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> QgVtc:
        known = PerFrame.fit(self, site)
        if known.stages < 1:
            raise ReductionError(f"`stages` must be at least 1; found {known.stages}")
        if known.weights is not None and not (site.dim and site.llm_dim):
            raise ReductionError(
                "`weights` need the widths of tower and language model, which this model does not tell"
            )
        return known

    def trained(self, site: Site) -> dict[str, tuple[int, ...]]:
        if self.weights is None:
            return {}
        dim = site.dim
        return {
            "question_in": (site.llm_dim, dim),
            "question_in_bias": (dim,),
            "question_out": (dim, dim),
            "question_out_bias": (dim,),
        }

    def forward(self, signals: Signals) -> Reduced:
        question = mean_text(signals)
        if self.weights is not None:
            w_in, b_in, w_out, b_out = (signals[name].float() for name in TRAINED)
            question = (question @ w_in + b_in).clamp(min=0) @ w_out + b_out
        return PerFrame.forward(self, {"hidden": signals["hidden"], "text": question})

    def reduce_frame(self, signals: Signals) -> Reduced:
        """`text` is one vector here."""
        assert self.keep is not None
        hidden, question = signals["hidden"], normalize(signals["text"]).unsqueeze(-1)
        n = hidden.shape[1]
        x, index = hidden.float(), spread(list(range(n)), hidden)
        size = torch.ones_like(x[..., 0])
        for count in counts(n, self.keep, self.stages):
            kept = select(snap((normalize(x) @ question).squeeze(-1)), count)
            x, size = share_out(x, size, kept)
            index = take(index, kept)
        return Reduced(x.to(hidden.dtype), index, size)


TRAINED = ("question_in", "question_in_bias", "question_out", "question_out_bias")


def counts(tokens: int, keep: int, stages: int) -> list[int]:
    """Tokens after each stage that drops any.

    >>> counts(576, 72, 3)
    [288, 144, 72]
    """
    after = [max(keep, round(tokens * (keep / tokens) ** ((i + 1) / stages))) for i in range(stages - 1)] + [keep]
    return [count for count, before in zip(after, [tokens, *after], strict=False) if count < before]


def share_out(x: Tensor, size: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Every token that is not kept, shared out among those that are.

    Args:
        x: float32 [batch, n, dim]. size: float32 [batch, n]. kept: int64 [batch, k], ascending, k < n.
    Returns:
        tokens [batch, k, dim] and sizes [batch, k].
    """
    unit, rest = normalize(x), complement(kept, x.shape[1])
    logits = take(unit, rest) @ take(unit, kept).transpose(1, 2) * x.shape[-1] ** 0.5
    share = (torch.softmax(logits, -1) * take(size, rest).unsqueeze(-1)).transpose(1, 2)  # [batch, k, n - k]
    own = take(size, kept)
    total = own + share.sum(-1)
    return (take(x, kept) * own.unsqueeze(-1) + share @ take(x, rest)) / total.unsqueeze(-1), total


METHOD = QgVtc
