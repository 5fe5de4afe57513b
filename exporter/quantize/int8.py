"""INT8 with a scale per output channel, which clips nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exporter.quantize._contract import Form, Quantized, Quantizer, Seen

CHANNELS = 128
"""Output channels at a time."""


class Int8(Quantizer):
    summary = "INT8, an output channel's largest weight is 127"
    calibrated = False

    def form(self, inputs: int, blocks: Sequence[int]) -> Form | None:
        return Form(8, inputs)

    def quantize(self, weight: Tensor, block: int, seen: Seen | None = None) -> Quantized:
        by_output = weight.t()
        q = torch.empty(by_output.shape, dtype=torch.int8)
        scales = torch.empty(len(by_output))
        for start in range(0, len(by_output), CHANNELS):
            channels = by_output[start : start + CHANNELS].float()
            scale = channels.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
            q[start : start + CHANNELS] = (channels / scale).round_().clamp_(-127, 127).to(torch.int8)
            scales[start : start + CHANNELS] = scale[:, 0]
        return Quantized.of(q.t(), scales[None], 8)


QUANTIZER = Int8()
