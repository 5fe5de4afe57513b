"""GPTQ: weights are rounded one input channel after another, and those not yet rounded make up for each error.

The channel with the largest activations goes first (the published "activation order"). The scales of all blocks are chosen before, so
every weight keeps its place and its block, and nothing has to be permuted at run time.

Source: Frantar et al. 2022, arXiv:2210.17323. Differs: symmetric; a block's scale is the one with the least squared error, each channel
counting by its mean square; damping grows tenfold where the Gram matrix cannot be inverted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.errors import ExportError
from exporter.quantize import rtn
from exporter.quantize._contract import Quantized, Quantizer, Seen

DAMPING = 0.01
"""Of the mean of the Gram matrix's diagonal, added to that diagonal."""
LAZY = 128
"""Channels whose errors reach the rest of the matrix in one product."""


class Gptq(Quantizer):
    summary = "weights not yet rounded make up for the errors of those that are, by second-order statistics of the activations"
    gram = True

    def quantize(self, weight: Tensor, block: int, seen: Seen | None = None) -> Quantized:
        assert seen is not None
        return quantize(weight, block, seen.gram)


def quantize(weight: Tensor, block: int, gram: Tensor) -> Quantized:
    """Quantise weight [in, out] for inputs with mean x xᵀ = gram [in, in]."""
    power = gram.diagonal().clone()
    dead = power == 0
    weight = weight.float().masked_fill(dead[:, None], 0.0)
    scale = rtn.quantize(weight, block, power).scale
    order = torch.argsort(power, descending=True, stable=True)
    steps = scale.repeat_interleave(block, 0)[order]
    inverse = inverse_factor(gram[order][:, order])
    left = weight[order].clone()
    q = torch.empty(weight.shape, dtype=torch.int8)
    for start in range(0, len(left), LAZY):
        part = slice(start, min(start + LAZY, len(left)))
        rows, factor = left[part], inverse[part, part]
        errors = torch.empty_like(rows)
        for i in range(len(rows)):
            step = steps[start + i]
            rounded = (rows[i] / step).round_().clamp_(-8, 7)
            q[order[start + i]] = rounded.to(torch.int8)
            errors[i] = (rows[i] - rounded * step) / factor[i, i]
            rows[i:] -= factor[i, i:, None] * errors[i]
        left[part.stop :] -= inverse[part, part.stop :].t() @ errors
    return Quantized.of(q, scale)


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U with Uᵀ U = (gram + damping)⁻¹: row i holds how the error of channel i is spread over those behind."""
    diagonal = gram.diagonal()
    damping = DAMPING * float(diagonal.mean()) or 1.0
    for _ in range(4):
        damped = gram + damping * torch.eye(len(gram))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                found: Tensor = upper
                return found
        damping *= 10
    raise ExportError(
        "GPTQ: the activations of the calibration data have no usable statistics (not finite, or all alike). Pass other --calibration."
    )


QUANTIZER = Gptq()
