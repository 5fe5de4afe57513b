"""FP8 (E4M3) with a scale per output channel, whose largest weight becomes FP8's largest number.

Source: Micikevicius et al. 2022, arXiv:2209.05433; ONNX calls the type FLOAT8E4M3FN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exporter.quantize._contract import Form, Quantized, Quantizer, Seen

CHANNELS = 128
"""Output channels at a time."""
LARGEST = 448.0
"""Of E4M3, which has no infinity."""


class Fp8(Quantizer):
    summary = "FP8 (E4M3), an output channel's largest weight is 448; GPUs from SM 8.9 on"
    calibrated = False

    def form(self, inputs: int, blocks: Sequence[int]) -> Form | None:
        return Form(8, inputs, floats=True)

    def quantize(self, weight: Tensor, block: int, seen: Seen | None = None) -> Quantized:
        by_output = weight.t()
        q = torch.empty(by_output.shape, dtype=torch.uint8)
        scales = torch.empty(len(by_output))
        for start in range(0, len(by_output), CHANNELS):
            channels = by_output[start : start + CHANNELS].float()
            scale = channels.abs().amax(1, keepdim=True).clamp_min(1e-8) / LARGEST
            nearest = (channels / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            q[start : start + CHANNELS] = nearest.view(torch.uint8)
            scales[start : start + CHANNELS] = scale[:, 0]
        return Quantized(Form(8, len(weight), floats=True), q.t().contiguous().view(-1), scales[None])


QUANTIZER = Fp8()
