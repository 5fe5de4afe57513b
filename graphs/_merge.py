"""Assigning tokens to others and averaging them, by comparison and MatMul: no scatter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphs._blocks import complement, first, normalize, one_hot, snap, take
from graphs._contract import Reduced
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def nearest(metric: Tensor, others: Tensor, targets: Tensor) -> Tensor:
    """int64 [batch, m]: for every token of `others`, the place in `targets` of the one with the largest cosine.

    Args:
        metric: [batch, n, dim], any float type. others: int64 [batch, m]. targets: int64 [batch, k].
    """
    metric = normalize(metric)
    return first(snap(take(metric, others) @ take(metric, targets).transpose(-1, -2)))


def members(owner: Tensor, groups: int) -> Tensor:
    """float32 [batch, groups, n], 1 where token i belongs to group g. owner: int64 [batch, n]."""
    return one_hot(owner, groups, torch.float32).transpose(-1, -2)


def around(metric: Tensor, targets: Tensor) -> Tensor:
    """0/1 float32 [batch, k, n]: groups of all n tokens around k targets, each other token with the most similar target.

    Args:
        metric: [batch, n, dim], compared by cosine. targets: int64 [batch, k], ascending.
    """
    n, k = metric.shape[1], targets.shape[1]
    own = one_hot(targets, n, torch.float32)
    if k == n:
        return own
    others = complement(targets, n)
    return own + members(nearest(metric, others, targets), k) @ one_hot(others, n, torch.float32)


def mean(member: Tensor, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weighted mean of every group, and its weight; 0 for an empty group. Accumulated in float32.

    Args:
        member: float32 [batch, groups, n]. x: [batch, n, dim]. weight: [batch, n], 1 if None.
    Returns:
        float32 [batch, groups, dim] and [batch, groups].
    """
    if weight is not None:
        member = member * weight.unsqueeze(-2)
    total = member.sum(-1)
    return (member @ x.float()) / torch.where(total == 0, 1.0, total).unsqueeze(-1), total


def absorb(hidden: Tensor, kept: Tensor, metric: Tensor, size: Tensor | None = None) -> Reduced:
    """Every dropped token joins the kept one it resembles most; a kept token becomes the mean of its group.

    Args:
        hidden: [batch, n, dim]. kept: int64 [batch, k], ascending. metric: [batch, n, any], compared by cosine.
        size: float32 [batch, n], how many tokens each one stands for; 1 if None.
    Returns:
        tokens [batch, k, dim], index = `kept`, size float32 [batch, k].
    """
    n, k = hidden.shape[1], kept.shape[1]
    size = torch.ones_like(hidden[..., 0], dtype=torch.float32) if size is None else size
    if k == n:
        return Reduced(hidden, kept, size)
    dropped = complement(kept, n)
    joins = members(nearest(metric, dropped, kept), k)
    own, weight = take(size, kept), take(size, dropped)
    total = own + (joins @ weight.unsqueeze(-1)).squeeze(-1)
    merged = take(hidden, kept).float() * own.unsqueeze(-1)
    merged = merged + joins @ (take(hidden, dropped).float() * weight.unsqueeze(-1))
    return Reduced((merged / total.unsqueeze(-1)).to(hidden.dtype), kept, total)
