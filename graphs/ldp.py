"""Project with MobileVLM's LDP: an MLP and two inverted residual blocks, the second of which halves the raster.

hidden [batch, frames, rows · cols, dim] → tokens [batch, frames, ⌈rows/2⌉ · ⌈cols/2⌉, llm_dim].

1. Linear, GELU, Linear to the language model's width.
2. An inverted residual block of MobileNetV3: depthwise 3 × 3 convolution, norm, hard-swish; squeeze and excitation with a
   hard-sigmoid; 1 × 1 convolution, norm; what came in is added. Norms are layer norms over the channels of a token.
3. The same with a stride of 2, and nothing added.

Source: Chu et al. 2023, "MobileVLM: A Fast, Strong and Open Vision Language Assistant for Mobile Devices", arXiv:2312.16886.
Knobs:
    weights: the published checkpoint, or its tensors `model.mm_projector.…` alone.
Position: one each, as if the tower had given so many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import (
    PerFrameCompressor,
    Shapes,
    conv,
    conv_shapes,
    layer_norm,
    linear,
    linear_shapes,
    mlp,
    norm_shapes,
    raster,
    squeeze_excite,
    to_planes,
    to_tokens,
)
from graphs._contract import Signals, Site
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("ldp",)
SWEEP = "ldp"
FIRST, SECOND = "model.mlp.1", "model.mlp.3"
SAME, HALF = "model.mb_block.1.block", "model.mb_block.2.block"


@dataclass(frozen=True)
class Ldp(PerFrameCompressor):
    """MobileVLM's projector."""

    paper: ClassVar[str] = "Chu et al. 2023, arXiv:2312.16886"

    def shape(self, site: Site) -> tuple[int, int]:
        rows, cols = raster(site)
        return (rows + 1) // 2, (cols + 1) // 2

    def trained(self, site: Site) -> Shapes:
        dim = site.llm_dim
        return {
            **linear_shapes(FIRST, site.dim, dim),
            **linear_shapes(SECOND, dim, dim),
            **_block_shapes(SAME, dim),
            **_block_shapes(HALF, dim),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        x = mlp(signals, FIRST, SECOND, signals["hidden"])
        x = x + _block(signals, SAME, x, raster(site), 1)
        return _block(signals, HALF, x, raster(site), 2)


def _block_shapes(name: str, dim: int) -> Shapes:
    squeezed = _divisible(dim // 4)
    return {
        **conv_shapes(f"{name}.0.0", dim, dim, (3, 3), groups=dim, bias=False),
        **norm_shapes(f"{name}.0.1", dim),
        **conv_shapes(f"{name}.1.fc1", dim, squeezed, (1, 1)),
        **conv_shapes(f"{name}.1.fc2", squeezed, dim, (1, 1)),
        **conv_shapes(f"{name}.2.0", dim, dim, (1, 1), bias=False),
        **norm_shapes(f"{name}.2.1", dim),
    }


def _block(signals: Signals, name: str, x: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    f = torch.nn.functional
    planes = conv(signals, f"{name}.0.0", to_planes(x, grid), stride=stride, padding=1, groups=x.shape[-1])
    x = f.hardswish(layer_norm(signals, f"{name}.0.1", to_tokens(planes)))
    x = squeeze_excite(signals, f"{name}.1", x, torch.relu, f.hardsigmoid)
    return layer_norm(signals, f"{name}.2.1", linear(signals, f"{name}.2.0", x))


def _divisible(channels: int) -> int:
    """The multiple of 8 nearest to it, at least 8 and nine tenths of it, as MobileNet makes its widths."""
    found = max(8, (channels + 4) // 8 * 8)
    return found if found >= 0.9 * channels else found + 8


METHOD = Ldp
