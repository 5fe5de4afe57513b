"""One round of ToMe's bipartite matching (arXiv:2210.09461): even places look for partners among odd ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from graphs._blocks import ascending, complement, normalize, one_hot, rank, snap, spread, take
from graphs._contract import Reduced
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

NEVER = -1e9
"""Below every snapped cosine."""


class Match(NamedTuple):
    """Places among the even tokens that stay [batch, even - r] and go [batch, r], both ascending, and where among the
    odd ones each goes [batch, r]. All int64."""

    stays: Tensor
    goes: Tensor
    partner: Tensor


def match(metric: Tensor, r: int, protected: int = 0) -> Match:
    """The r even tokens with the best partner (largest cosine; the earlier among equals).

    Args:
        metric: [batch, n, dim], any float type. r: at most the number of even places that are not protected.
        protected: leading even places that never go (1: the class token).
    """
    unit, even = normalize(metric), metric.shape[1] - metric.shape[1] // 2
    similarity = snap(unit[:, ::2] @ unit[:, 1::2].transpose(1, 2))
    best = similarity.amax(-1)
    if protected:
        best = torch.where(torch.arange(even) < protected, torch.full((), NEVER), best)
    goes = ascending(rank(best, r))
    partner = take(rank(similarity, 1).squeeze(-1), goes)
    return Match(complement(goes, even), goes, partner)


def merge(hidden: Tensor, size: Tensor, found: Match) -> Reduced:
    """Size-weighted mean of what goes and its partner. Out come the rest of the even tokens, then all odd ones.

    Args:
        hidden: [batch, n, dim]. size: float32 [batch, n].
    """
    n = hidden.shape[1]
    into = one_hot(found.partner, n // 2, torch.float32).transpose(1, 2)
    weighted = hidden.float() * size.unsqueeze(-1)
    new_size = size[:, 1::2] + (into @ take(size[:, ::2], found.goes).unsqueeze(-1)).squeeze(-1)
    merged = (weighted[:, 1::2] + into @ take(weighted[:, ::2], found.goes)) / new_size.unsqueeze(-1)
    tokens = torch.cat([take(hidden[:, ::2], found.stays), merged.to(hidden.dtype)], 1)
    index = torch.cat([2 * found.stays, spread(list(range(1, n, 2)), hidden)], 1)
    return Reduced(tokens, index, torch.cat([take(size[:, ::2], found.stays), new_size], 1))
