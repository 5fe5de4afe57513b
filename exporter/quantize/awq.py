"""AWQ: channels that carry large activations are scaled up before rounding, and what feeds them is scaled down by as much.

Per group of matrices with one input, the scale of channel i is mean|x_i|^α, normalised by the geometric mean of its extremes, with the α of
a grid that changes the matrices' outputs least; then, per block, the clipping point with the least squared error, each channel
counting by its mean square.

Source: Lin et al. 2023, arXiv:2306.00978. Differs: the loss is that of the matrices' own outputs, not of the attention or MLP
around them; no zero points; errors in the search for the clipping point are weighted channel by channel, not run on tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exporter.quantize import rtn
from exporter.quantize._contract import Quantized, Quantizer, Seen

ALPHAS = tuple(i / 20 for i in range(20))
CLIPS = tuple(7 / (1 - i / 20) for i in range(10))
"""Down to half of the largest weight, as published."""


class Awq(Quantizer):
    summary = (
        "activation-aware: channels with large activations are scaled up first, the norm or matrix before them down"
    )

    def scale(self, weights: Sequence[Tensor], seen: Seen, block: int) -> Tensor | None:
        best, least = None, torch.inf
        for alpha in ALPHAS:
            scale = scaling(seen.magnitude, alpha)
            loss = sum(self._loss(weight, scale, seen, block) for weight in weights)
            if loss < least:
                best, least = scale, loss
        return best

    def _loss(self, weight: Tensor, scale: Tensor, seen: Seen, block: int) -> float:
        rounded = rtn.quantize(weight * scale[:, None], block, clips=(7.0,)).dequantized()
        return seen.energy(rounded / scale[:, None] - weight)

    def quantize(self, weight: Tensor, block: int, seen: Seen | None = None) -> Quantized:
        assert seen is not None
        return rtn.quantize(weight, block, seen.power, CLIPS)


def scaling(magnitude: Tensor, alpha: float) -> Tensor:
    """[in], mean |x| → [in], positive; all ones at α = 0."""
    scale = magnitude.clamp_min(1e-4).pow(alpha)
    normed: Tensor = scale / (scale.max() * scale.min()).sqrt()
    return normed


QUANTIZER = Awq()
