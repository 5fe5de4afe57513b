"""Density-peak clustering with a fixed number of clusters (DPC-kNN), deterministic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphs._blocks import TINY, ascending, first, one_hot, rank, snap, take
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

NOISE = 1e-6


def density_peaks(x: Tensor, clusters: int, neighbours: int, *, raster: bool = True) -> tuple[Tensor, Tensor]:
    """Cluster centres and every token's cluster.

    Density is exp(-mean of the k smallest squared distances), the own one (0) among them, as in the official codes;
    a centre is far from everything denser. Of two tokens of equal density the earlier counts as denser, where the
    official codes add random noise. Every other token joins the nearest centre, the earlier one among equals.

    Args:
        x: [batch, n, dim], any float type. neighbours: k; capped at n.
        raster: centres in ascending order, else best first.
    Returns:
        centres int64 [batch, clusters]; owner int64 [batch, n], places in `centres`.
    """
    n = x.shape[1]
    distance = squared_distances(x)
    near = take_smallest(distance, min(neighbours, n)).mean(-1)
    density = snap(torch.exp(-near))
    a, b = density.unsqueeze(-1), density.unsqueeze(-2)
    place = torch.arange(n)
    denser = (b > a) | ((b == a) & (place[None, :] < place[:, None]))  # [batch, i, j]: j is denser than i
    far = distance.amax((1, 2), keepdim=True)
    delta = torch.where(denser, distance, far).amin(-1).sqrt()
    scale = far.squeeze(-1).sqrt().clamp(min=TINY)
    score = density * torch.round(delta * (4096.0 / scale))
    centres = rank(score, clusters)
    centres = ascending(centres) if raster else centres
    to_centre = take(distance, centres)  # [batch, clusters, n]; symmetric
    unit = far.transpose(1, 2).clamp(min=TINY)
    owner = first(-snap(to_centre.transpose(1, 2), unit))
    own = one_hot(centres, n, torch.float32)  # a centre belongs to itself, also where two centres coincide
    is_centre = own.sum(1) > 0
    slot = (own * torch.arange(clusters, dtype=torch.float32).unsqueeze(-1)).sum(1).to(torch.int64)
    return centres, torch.where(is_centre, slot, owner)


def squared_distances(x: Tensor) -> Tensor:
    """float32 [batch, n, n]: ‖x_i - x_j‖² / dim, snapped to 1/4096 of the largest, so that equal tokens are at 0.

    The largest counts as at least a millionth of the longest token's squared length: were all tokens equal, it would be
    nothing but rounding.
    """
    x = x.float() * x.shape[-1] ** -0.5
    floor = (NOISE * x.pow(2).sum(-1).amax(1)).clamp(min=TINY)[:, None, None]
    x = x - x.mean(1, keepdim=True)  # leaves distances as they are, and float32 more of their digits
    length = x.pow(2).sum(-1)
    raw = (length.unsqueeze(-1) + length.unsqueeze(-2) - 2 * (x @ x.transpose(1, 2))).clamp(min=0)
    step = torch.maximum(raw.amax((1, 2), keepdim=True), floor) / 4096.0
    return torch.round(raw / step) * step


def take_smallest(x: Tensor, k: int) -> Tensor:
    """The k smallest values along the last axis, ascending: [..., n] → [..., k]."""
    return torch.topk(x, k, dim=-1, largest=False, sorted=True).values
