"""Round-to-nearest INT4 in blocks along the input axis, with a small search for the clipping point of every block.

Scales are positive and there is no zero point: TensorRT refuses both a zero point and UINT4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exporter.quantize._contract import Form, Quantized, Quantizer, Seen

CLIPS = (7.0, 7.5, 8.0, 8.75)
"""Candidates for |block maximum| / scale. 7 clips nothing; larger values trade the extreme weight for a finer grid."""
CHANNELS = 128
"""Output channels at a time; even."""


class Rtn(Quantizer):
    summary = "round to nearest, per block the scale with the least squared error; no calibration"
    calibrated = False

    def quantize(self, weight: Tensor, block: int, seen: Seen | None = None) -> Quantized:
        return quantize(weight, block)


def quantize(weight: Tensor, block: int, importance: Tensor | None = None, clips: Sequence[float] = CLIPS) -> Quantized:
    """Quantise weight [in, out] (any float dtype); `in` must be a multiple of `block`, `out` even.

    A few output channels at a time, so that what is in float32 stays in the processor's cache. Fastest where the weight is
    a transposed view, as it comes from a checkpoint.

    Args:
        importance: [in], by which an input channel's squared error counts when a scale is chosen; None: all alike.
        clips: see `CLIPS`.
    """
    by_output = weight.t()
    outputs, inputs = by_output.shape
    pairs = torch.empty(outputs // 2, inputs, dtype=torch.uint8)
    scales = torch.empty(outputs, inputs // block)
    for start in range(0, outputs, CHANNELS):
        channels = by_output[start : start + CHANNELS].float().contiguous()
        counts = None if importance is None else importance.view(-1, block).repeat(len(channels), 1)
        scale, q = _nearest(channels.view(-1, block), counts, clips)
        nibbles = (q.view_as(channels) & 0xF).view(torch.uint8)
        pairs[start // 2 : (start + CHANNELS) // 2] = nibbles[0::2] | (nibbles[1::2] << 4)
        scales[start : start + CHANNELS] = scale.view(len(channels), -1)
    return Quantized(Form(4, block), pairs.t().contiguous().view(-1), scales.t().contiguous())


def _nearest(blocks: Tensor, importance: Tensor | None = None, clips: Sequence[float] = CLIPS) -> tuple[Tensor, Tensor]:
    """float32 [blocks, block] → the scale with the least squared error [blocks, 1], the first among equals, and int8 values
    [blocks, block]."""

    def rounded(scale: Tensor) -> Tensor:
        return torch.div(blocks, scale, out=scratch).round_().clamp_(-8, 7)

    scratch = torch.empty_like(blocks)
    top = blocks.abs().amax(1, keepdim=True).clamp_min(1e-8)
    best, least = top / clips[0], torch.full_like(top, torch.inf)
    for clip in clips:
        scale = top / clip
        error = rounded(scale).mul_(scale).sub_(blocks).square_()
        if importance is not None:
            error = error.mul_(importance)
        total = error.sum(1, keepdim=True)
        best = torch.where(total < least, scale, best)
        least = torch.minimum(total, least)
    return best, rounded(best).to(torch.int8)


QUANTIZER = Rtn()
