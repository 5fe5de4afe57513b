"""Project with VideoLLaMA2's STC: convolutions within frames, one over time and space that halves all three, and an MLP.

hidden [batch, frames, tokens, dim] → tokens [batch, about frames / 2, about tokens / 4, llm_dim].

1. Four RegNet blocks per frame: channels mixed, 3 × 3 depthwise, squeeze and excitation; norms over the channels.
2. A convolution over cells of 2 × 2 × 2 tokens (frames, rows, columns), SiLU.
3. Four RegNet blocks per frame again, then Linear, GELU, Linear.

Source: Cheng et al. 2024, "VideoLLaMA 2: Advancing Spatial-Temporal Modeling and Audio Understanding in Video-LLMs",
arXiv:2406.07476.
Knobs:
    padding: zeros around the clip before step 2, on every side of all three axes: an axis of n becomes n / 2 + padding, rounded
        down. 1 in VideoLLaMA2 (8 frames of 24 × 24: 5 × 13 × 13 = 845 tokens), 0 in VideoLLaMA2.1 (4 × 12 × 12 = 576).
    weights: the published checkpoint, or its tensors `model.mm_projector.…` alone.
Differs: nothing for clips. An image its authors repeat, as often as the model was trained with frames (8 or 16), which makes
more tokens of it than there were: give it as such a clip.
Position: counted anew: its frames are not those of the tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphs._clip import require_frames
from graphs._compressor import (
    Compressor,
    Shapes,
    compressed,
    conv,
    conv_shapes,
    from_clip,
    linear_shapes,
    mlp,
    raster,
    regnet,
    regnet_shapes,
    to_clip,
)
from graphs._contract import ReductionError, Signals, Site
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("stc", "stc:padding=0")
SWEEP = "stc"
DEPTH = 4


@dataclass(frozen=True)
class Stc(Compressor):
    """VideoLLaMA2's projector."""

    paper: ClassVar[str] = "Cheng et al. 2024, arXiv:2406.07476"

    padding: int = 1

    def fitted(self, site: Site) -> Stc:
        if self.padding not in (0, 1):
            raise ReductionError(f"`padding` must be 0 or 1; found {self.padding}")
        require_frames(site)
        rows, cols = raster(site)
        if min(rows, cols) < 2:
            raise ReductionError(f"it takes cells of 2 × 2 tokens of 2 frames; found {rows} × {cols} tokens")
        return self

    def after(self, site: Site) -> Site:
        frames, rows, cols = (n // 2 + self.padding for n in (site.frames, *raster(site)))
        return compressed(site, (rows, cols), frames)

    def trained(self, site: Site) -> Shapes:
        return {
            **regnet_shapes("s1", site.dim, site.llm_dim, DEPTH),
            **conv_shapes("sampler.0", site.llm_dim, site.llm_dim, (2, 2, 2)),
            **regnet_shapes("s2", site.llm_dim, site.llm_dim, DEPTH),
            **linear_shapes("readout.0", site.llm_dim, site.llm_dim),
            **linear_shapes("readout.2", site.llm_dim, site.llm_dim),
        }

    def forward(self, signals: Signals, site: Site) -> Tensor:
        after = self.after(site)
        assert after.grid is not None
        x = regnet(signals, "s1", DEPTH, signals["hidden"].flatten(0, 1), raster(site))
        clip = to_clip(x.unflatten(0, (-1, site.frames)), raster(site))
        x = from_clip(conv(signals, "sampler.0", clip, stride=2, padding=self.padding))
        x = regnet(signals, "s2", DEPTH, torch.nn.functional.silu(x).flatten(0, 1), after.grid)
        out: Tensor = mlp(signals, "readout.0", "readout.2", x).unflatten(0, (-1, after.frames))
        return out


METHOD = Stc
