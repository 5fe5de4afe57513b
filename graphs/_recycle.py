"""FiCoCo's last two steps (arXiv:2411.17686): what goes flows into the few tokens it correlates with most."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from graphs._blocks import complement, one_hot, rank, snap, take
from graphs._contract import Reduced
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

NEVER = -1e4
"""No softmax gives this any weight beside an attention."""

WEIGHTS = 256.0
"""Weights are whole parts of it, so that equal tokens stay equal in every runtime. Attention is so small that its
softmax is nearly even: on a grid much finer than this, the two runtimes would often round differently."""


def recycled(hidden: Tensor, size: Tensor, correlation: Tensor, goes: Tensor, targets: int) -> Reduced:
    """The tokens that stay, in raster order, each with what flows into it: (x + Σ w · x of those that go) / (1 + Σ w).

    A token that goes has as targets those that stay and that it correlates with most, the earlier among equals. Its
    weights w on them are a softmax of the correlations, to 1/256; the first target takes the rest to 1. Sizes move
    with the weights.

    Args:
        hidden: [batch, n, dim]. size: float32 [batch, n]. correlation: float32 [batch, n, n], on the scale of
            attention; rows go. goes: int64 [batch, r], ascending. targets: of each; at most as many as stay.
    """
    n, r = hidden.shape[1], goes.shape[1]
    stays = complement(goes, n)
    to = take(take(correlation, goes).transpose(1, 2), stays).transpose(1, 2)  # [batch, r, n - r]
    best = rank(snap(to, 1 / n), min(targets, n - r))
    chosen = one_hot(best, n - r, torch.float32)
    weight = torch.softmax(torch.where(chosen.sum(-2) > 0, to, NEVER), -1)
    weight = torch.round(weight * WEIGHTS) / WEIGHTS
    weight = (weight + chosen[:, :, 0] * (1 - weight.sum(-1, keepdim=True))).transpose(1, 2)
    merged = (take(hidden, stays).float() + weight @ take(hidden, goes).float()) / (1 + weight.sum(-1, keepdim=True))
    grown = take(size, stays) + (weight @ take(size, goes).unsqueeze(-1)).squeeze(-1)
    return Reduced(merged.to(hidden.dtype), stays, grown)


def target_count(quantile: float, tokens: int) -> int:
    """Tokens above the quantile, at least one.

    >>> target_count(0.998, 577)
    2
    """
    return max(1, math.ceil(round((1 - quantile) * tokens, 9)))
