"""NVFP4: FP4 (E2M1) in blocks of 16, a scale in FP8 (E4M3) for each, and one in float32 for all of these.

A block's largest weight becomes 6 or 4, E2M1's two largest numbers, whichever has the smaller squared error: between 4 and 6 there
is nothing, so that 6 serves blocks badly whose weights come near their largest ("four over six", Cook et al. 2025,
arXiv:2512.02010). As there, the largest weight of all gives a scale of 256, that the same one over 4 is still within E4M3.

Source: NVIDIA's ModelOpt, whose layout and rounding (to nearest, ties to even) this is; ONNX calls the type FLOAT4E2M1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exporter.quantize._contract import E2M1, Form, Quantized, Quantizer, Seen

BLOCK = 16
CHANNELS = 128
"""Output channels at a time; even."""
TOPS = (6.0, 4.0)
"""What a block's largest weight may become, the preferred first."""
LARGEST_SCALE = 256.0
FORM = Form(4, BLOCK, floats=True)
LEAST, MOST = 2.0**-9, 448.0
"""Of E4M3; TensorRT refuses scales that are zero."""


class Nvfp4(Quantizer):
    summary = "NVFP4 (E2M1 in blocks of 16 with E4M3 scales), a block's largest weight is 6 or 4; GPUs from SM 10.0 on"
    calibrated = False

    def form(self, inputs: int, blocks: Sequence[int]) -> Form | None:
        return None if inputs % BLOCK else FORM

    def quantize(self, weight: Tensor, block: int, seen: Seen | None = None) -> Quantized:
        by_output = weight.t()
        outputs, inputs = by_output.shape
        low, high = weight.aminmax()
        whole = torch.maximum(-low, high).float().clamp_min(1e-8) / (TOPS[0] * LARGEST_SCALE)
        pairs = torch.empty(outputs // 2, inputs, dtype=torch.uint8)
        scales = torch.empty(outputs, inputs // BLOCK)
        for start in range(0, outputs, CHANNELS):
            channels = by_output[start : start + CHANNELS].float().contiguous()
            scale, codes = _nearest(channels.view(-1, BLOCK), whole)
            codes = codes.view_as(channels)
            pairs[start // 2 : (start + CHANNELS) // 2] = codes[0::2] | (codes[1::2] << 4)
            scales[start : start + CHANNELS] = scale.view(len(channels), -1)
        return Quantized(FORM, pairs.t().contiguous().view(-1), scales.t().contiguous(), whole=float(whole))


def _nearest(blocks: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [blocks, 16] → E4M3 numbers [blocks, 1], of `TOPS` that with the least squared error, and codes, uint8 [blocks, 16]."""
    most, numbers = blocks.abs().amax(1, keepdim=True), torch.tensor(E2M1)
    best, found, least = torch.empty_like(most), torch.empty(0), torch.full_like(most, torch.inf)
    for top in TOPS:
        scale = (most / top / whole).clamp_(LEAST, MOST).to(torch.float8_e4m3fn).float()
        codes = encode(blocks / (scale * whole))
        error = (numbers[codes.int()] * (scale * whole) - blocks).square_().sum(1, keepdim=True)
        better = error < least
        best = torch.where(better, scale, best)
        found = torch.where(better, codes, found) if found.numel() else codes
        least = torch.where(better, error, least)
    return best, found


def encode(x: Tensor) -> Tensor:
    """float32 → the codes of the nearest E2M1 numbers, uint8. Beyond 6 is 6. Steps are 0.5 up to 2, 1 up to 4, then 2; an even code
    is an even multiple of its step, so that rounding half to even is E2M1's."""
    size = x.abs()
    code = torch.where(size < 2, (2 * size).round_(), torch.where(size < 4, size.round() + 2, (size / 2).round_() + 4))
    return code.clamp_(max=7).to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


QUANTIZER = Nvfp4()
