"""Project with Qwen2-VL's and Qwen2.5-VL's merger: a norm, every 2 × 2 tokens side by side in one, then an MLP.

hidden [batch, frames, tokens, dim] → tokens [batch, frames, tokens / 4, llm_dim].

1. Every token is normed.
2. The four tokens of every 2 × 2 cell, row by row, become one of 4 dim.
3. Linear (4 dim wide), GELU, Linear to the language model's width.

Those models' own towers end with it, so there it is not a reduction to ask for; it is for towers that do not.

Source: Bai et al. 2025, "Qwen2.5-VL Technical Report", arXiv:2502.13923; Wang et al. 2024, "Qwen2-VL: Enhancing
Vision-Language Model's Perception of the World at Any Resolution", arXiv:2409.12191.
Knobs:
    norm: "rms" (Qwen2.5-VL) or "layer" (Qwen2-VL).
    weights: a published checkpoint, or its tensors `visual.merger.…` alone.
Position: one each, as if the tower had given so many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._compressor import (
    PerFrameCompressor,
    Shapes,
    cells,
    halved,
    layer_norm,
    linear_shapes,
    mlp,
    norm_shapes,
    raster,
    rms_norm,
)
from graphs._contract import Signals, Site

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("qwen_merger", "qwen_merger:norm=layer")
SWEEP = "qwen_merger"
NORM, FIRST, SECOND = "ln_q", "mlp.0", "mlp.2"
EPS = 1e-6


@dataclass(frozen=True)
class QwenMerger(PerFrameCompressor):
    """Qwen2.5-VL's merger."""

    paper: ClassVar[str] = "Bai et al. 2025, arXiv:2502.13923"
    prefixes: ClassVar[tuple[str, ...]] = ("", "visual.merger.", "model.visual.merger.")

    norm: Literal["rms", "layer"] = "rms"

    def shape(self, site: Site) -> tuple[int, int]:
        return halved(site)

    def trained(self, site: Site) -> Shapes:
        return {
            **norm_shapes(NORM, site.dim, bias=self.norm == "layer"),
            **linear_shapes(FIRST, 4 * site.dim, 4 * site.dim),
            **linear_shapes(SECOND, 4 * site.dim, site.llm_dim),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        norm = layer_norm if self.norm == "layer" else rms_norm
        x = norm(signals, NORM, signals["hidden"], EPS)
        return mlp(signals, FIRST, SECOND, cells(x, raster(site), 2).flatten(2))


METHOD = QwenMerger
