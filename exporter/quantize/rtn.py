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
CHANNELS = 128
"""Output channels at a time; even."""


class Int4(NamedTuple):
    """packed: uint8 [in * out / 2], two values per byte, the first in the low half. scale: float32 [in / block, out]."""

    packed: Tensor
    scale: Tensor


def block_size(inputs: int, candidates: tuple[int, ...] = (128, 64, 32)) -> int | None:
    """The largest block that divides the input axis, or None."""
    return next((b for b in candidates if inputs % b == 0), None)


def quantize(weight: Tensor, block: int) -> Int4:
    """Quantise weight [in, out] (any float dtype); `in` must be a multiple of `block`, `out` even.

    A few output channels at a time, so that what is in float32 stays in the processor's cache. Fastest where the weight is
    a transposed view, as it comes from a checkpoint.
    """
    import torch

    by_output = weight.t()
    outputs, inputs = by_output.shape
    pairs = torch.empty(outputs // 2, inputs, dtype=torch.uint8)
    scales = torch.empty(outputs, inputs // block)
    for start in range(0, outputs, CHANNELS):
        channels = by_output[start : start + CHANNELS].float().contiguous()
        scale, q = _nearest(channels.view(-1, block))
        nibbles = (q.view_as(channels) & 0xF).view(torch.uint8)
        pairs[start // 2 : (start + CHANNELS) // 2] = nibbles[0::2] | (nibbles[1::2] << 4)
        scales[start : start + CHANNELS] = scale.view(len(channels), -1)
    return Int4(pairs.t().contiguous().view(-1), scales.t().contiguous())


def _nearest(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [blocks, block] → the scale with the least squared error [blocks, 1], the first among equals, and int8 values
    [blocks, block]."""
    import torch

    def rounded(scale: Tensor) -> Tensor:
        return torch.div(blocks, scale, out=scratch).round_().clamp_(-8, 7)

    scratch = torch.empty_like(blocks)
    top = blocks.abs().amax(1, keepdim=True).clamp_min(1e-8)
    best, least = top / CLIPS[0], torch.full_like(top, torch.inf)
    for clip in CLIPS:
        scale = top / clip
        error = rounded(scale).mul_(scale).sub_(blocks).square_().sum(1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best, rounded(best).to(torch.int8)


def dequantize(packed: Tensor, scale: Tensor, block: int) -> Tensor:
    """The float32 weight [in, out] that `quantize` stands for."""
    import torch

    low, high = packed & 0xF, packed >> 4
    q = torch.stack([low, high], 1).reshape(-1, block, scale.shape[1]).to(torch.float32)
    q = torch.where(q > 7, q - 16, q)
    return (q * scale.unsqueeze(1)).flatten(0, 1)
