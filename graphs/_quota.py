"""Budgets over groups: whole quotas from shares, and selection inside every group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphs._blocks import placement, snap
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def quotas(share: Tensor, total: int) -> Tensor:
    """int64 [batch, groups] that sum to `total`, by largest remainder (the earlier group among equals).

    Args:
        share: float32 [batch, groups], non-negative; only proportions matter. All zero counts as all equal.
    """
    parts = units(share)
    exact = parts * total / parts.sum(-1, keepdim=True)
    base = torch.floor(exact)
    short = (total - base.sum(-1, keepdim=True)).to(torch.int64)
    return base.to(torch.int64) + (placement(snap(exact - base)) < short).to(torch.int64)


def units(share: Tensor) -> Tensor:
    """Snapped [batch, groups]: each group's part of all shares. They need not sum to 4096, as each is rounded.

    Args:
        share: float32 [batch, groups], non-negative; all zero counts as all equal.
    """
    whole = share.sum(-1, keepdim=True)
    return snap(torch.where(whole > 0, share / torch.where(whole > 0, whole, 1.0), 1.0 / share.shape[-1]))


def best_of_groups(score: Tensor, quota: Tensor) -> Tensor:
    """bool [batch, groups, m]: whether a token is among the `quota` best of its group.

    Args:
        score: snapped [batch, groups, m]. quota: int64 [batch, groups], or a constant that broadcasts to it.
    """
    return placement(score) < quota.unsqueeze(-1)
