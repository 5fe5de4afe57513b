"""Round-to-nearest INT4 in blocks along the input axis, with a small search for the clipping point of every block.

Layout: weight [in, out], scale [in / block, out], value = scale * q, q in -8..7. Scales are positive and there is no zero
point: TensorRT refuses both a zero point and UINT4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

CLIPS = (7.0, 7.5, 8.0, 8.75)
"""Candidates for |block maximum| / scale. 7 clips nothing; larger values trade the extreme weight for a finer grid."""


class Int4(NamedTuple):
    """packed: uint8 [in * out / 2], two values per byte, the first in the low half. scale: float32 [in / block, out]."""

    packed: Tensor
    scale: Tensor


def block_size(inputs: int, candidates: tuple[int, ...] = (128, 64, 32)) -> int | None:
    """The largest block that divides the input axis, or None."""
    return next((b for b in candidates if inputs % b == 0), None)


def quantize(weight: Tensor, block: int) -> Int4:
    """Quantise weight [in, out] (any float dtype); `in` must be a multiple of `block`, `out` even."""
    import torch

    w = weight.float().unflatten(0, (-1, block))
    top = w.abs().amax(1, keepdim=True).clamp_min(1e-8)
    best_scale = best_error = best_q = None
    for clip in CLIPS:
        scale = top / clip
        q = torch.round(w / scale).clamp_(-8, 7)
        error = (q * scale - w).pow_(2).sum(1, keepdim=True)
        if best_error is None:
            best_scale, best_error, best_q = scale, error, q
        else:
            assert best_scale is not None and best_q is not None
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_q = torch.where(better, q, best_q)
            best_error = torch.where(better, error, best_error)
    assert best_scale is not None and best_q is not None
    nibbles = best_q.to(torch.int8).reshape(-1, 2) & 0xF
    packed = (nibbles[:, 0] | (nibbles[:, 1] << 4)).to(torch.uint8)
    return Int4(packed, best_scale.squeeze(1))


def dequantize(packed: Tensor, scale: Tensor, block: int) -> Tensor:
    """The float32 weight [in, out] that `quantize` stands for."""
    import torch

    low, high = packed & 0xF, packed >> 4
    q = torch.stack([low, high], 1).reshape(-1, block, scale.shape[1]).to(torch.float32)
    q = torch.where(q > 7, q - 16, q)
    return (q * scale.unsqueeze(1)).flatten(0, 1)
