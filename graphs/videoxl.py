"""Project with Video-XL's token synthesis: attention in space and in time, four frames into one.

hidden [batch, frames, tokens, dim] → tokens [batch, frames / 4 rounded up, tokens / 4, llm_dim]; of an image all tokens.

1. The features are stretched to `grid` (bilinear).
2. Frames go in fours, the last of a clip repeated where it is short; an image is repeated four times. What is in a four is
   laid out anew, four neighbouring channels as four frames, and learned vectors are added, one per frame.
3. Twice: every frame attends to itself (group norm, one head), every place to itself over time (group norm, one head,
   learned relative positions for keys and values), and a 3 × 3 × 3 convolution halves the frames, with the border repeated.
4. Linear, GELU, Linear to the language model's width; of a clip the mean of every 2 × 2 tokens.

Source: Liu et al. 2025, "Video-XL-Pro: Reconstructive Token Compression for Extremely Long Video Understanding",
arXiv:2503.18478; with the same encoder Qin et al. 2025, "Video-XL-2", arXiv:2506.19225.
Knobs:
    grid: rows+columns of step 1. By default 24+24 of 27+27, SigLIP's at 384 pixels, and else what the tower gives.
    weights: the published checkpoint, or its tensors `model.sae.…` and `model.mm_projector.…` alone.
Differs: 2 and 3 are those of the official code, which the weights go with: it takes [frames, channels] of a four for
[channels, frames] without transposing, and has the relative keys of query and key the other way round. Video-XL-Pro
repeats frames drawn at random where a clip is no multiple of four, Video-XL-2 the last one. Not here is what the two do
behind it: Pro drops a share of the tokens that it draws at random and rotates the others; the time stamps between fours
are text, and the chunks of Video-XL-2's cache are the runtime's. The first Video-XL is `vst`.
Position: counted anew: its frames are not those of the tower.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import (
    Compressor,
    Shapes,
    Stretched,
    attention,
    cells,
    compressed,
    conv,
    conv_shapes,
    from_clip,
    linear,
    linear_shapes,
    mlp,
    norm_shapes,
    stacked,
    to_clip,
)
from graphs._contract import ReductionError, Signals, Site
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("videoxl", "videoxl:grid=2+4")
SWEEP = "videoxl"
FOUR, GROUPS, FARTHEST = 4, 32, 64
SPATIAL, TEMPORAL, HALVING = (0, 3), (1, 4), (2, 5)
EPS = 1e-6


@dataclass(frozen=True)
class VideoXL(Stretched, Compressor):
    """Video-XL-Pro's and Video-XL-2's encoder and projector."""

    paper: ClassVar[str] = "Liu et al. 2025, arXiv:2503.18478"
    prefixes: ClassVar[tuple[str, ...]] = ("", "model.")

    grid: tuple[int, ...] | None = None

    def fitted(self, site: Site) -> VideoXL:
        found = self.wanted(site)
        if len(found) != 2 or min(found) < 1 or (site.frames > 1 and any(side % 2 for side in found)):
            raise ReductionError(
                f"`grid` takes rows+columns, which must be even for clips, as 2 × 2 tokens of one become one; found "
                f"{'+'.join(map(str, found))}"
            )
        return replace(self, grid=found)

    def after(self, site: Site) -> Site:
        rows, cols = self.lengths
        shape = (rows // 2, cols // 2) if site.frames > 1 else (rows, cols)
        return compressed(site, shape, -(-site.frames // FOUR))

    def trained(self, site: Site) -> Shapes:
        dim = site.dim
        made: Shapes = {"temporal_encoding": (FOUR, dim)}
        for n in (*SPATIAL, *TEMPORAL):
            made |= norm_shapes(f"encoder.{n}.norm", dim)
        for n in SPATIAL:
            for name in ("q", "k", "v", "proj_out"):
                made |= conv_shapes(f"encoder.{n}.{name}", dim, dim, (1, 1, 1))
        for n in TEMPORAL:
            made |= conv_shapes(f"encoder.{n}.qkv", dim, 3 * dim, (1,))
            made |= conv_shapes(f"encoder.{n}.proj_out", dim, dim, (1,))
            made |= {f"encoder.{n}.relative_position_{x}.embeddings_table": (2 * FARTHEST + 1, dim) for x in "kv"}
        for n in HALVING:
            made |= conv_shapes(f"encoder.{n}.conv", dim, dim, (3, 3, 3))
        return {
            **stacked("sae", made),
            **linear_shapes("mm_projector.0", dim, site.llm_dim),
            **linear_shapes("mm_projector.2", site.llm_dim, site.llm_dim),
        }

    def forward(self, signals: Signals, site: Site) -> Tensor:
        x, dim, fours = self.stretched(signals["hidden"], site), site.dim, self.after(site).frames
        if site.frames < FOUR * fours:
            x = torch.cat([x, x[:, -1:].expand(-1, FOUR * fours - site.frames, -1, -1)], 1)
        x = x.unflatten(1, (fours, FOUR)).flatten(0, 1)
        x = x.transpose(1, 2).flatten(2).unflatten(2, (dim, FOUR)).permute(0, 3, 1, 2)
        x = x + signals["sae.temporal_encoding"].unsqueeze(1)
        for spatial, temporal, halving in zip(SPATIAL, TEMPORAL, HALVING, strict=True):
            x = _attend_in_space(signals, f"sae.encoder.{spatial}", x)
            x = _attend_in_time(signals, f"sae.encoder.{temporal}", x)
            x = _halve(signals, f"sae.encoder.{halving}.conv", x, self.lengths)
        x = mlp(signals, "mm_projector.0", "mm_projector.2", x.squeeze(1))
        if site.frames > 1:
            x = cells(x, self.lengths, 2).mean(2)
        out: Tensor = x.unflatten(0, (-1, fours))
        return out


def _attend_in_space(signals: Signals, name: str, x: Tensor) -> Tensor:
    """Tokens [n, frames, tokens, dim] of a frame among themselves; the norm is over all frames."""
    normed = _group_norm(signals, f"{name}.norm", x.flatten(1, 2)).unflatten(1, x.shape[1:3]).flatten(0, 1)
    q, k, v = (linear(signals, f"{name}.{part}", normed) for part in "qkv")
    found: Tensor = linear(signals, f"{name}.proj_out", attention(q, k, v, 1)).unflatten(0, (-1, x.shape[1]))
    return x + found


def _attend_in_time(signals: Signals, name: str, x: Tensor) -> Tensor:
    """Every place of [n, frames, tokens, dim] over its frames."""
    frames, tokens, dim = x.shape[1:]
    places = x.transpose(1, 2).flatten(0, 1)
    q, k, v = linear(signals, f"{name}.qkv", _group_norm(signals, f"{name}.norm", places)).chunk(3, -1)
    far_k, far_v = (_relative(signals[f"{name}.relative_position_{part}.embeddings_table"], frames) for part in "kv")
    scaled = q * dim**-0.25
    scores = scaled @ (k * dim**-0.25).transpose(1, 2)
    crossed = (scaled.unsqueeze(2) @ far_k.transpose(1, 2)).squeeze(2)  # [places, key, query]: as published
    weights = torch.softmax((scores + crossed.transpose(1, 2)).float(), -1).to(v.dtype)
    found = linear(signals, f"{name}.proj_out", weights @ v + (weights.unsqueeze(2) @ far_v).squeeze(2))
    out: Tensor = x + found.unflatten(0, (-1, tokens)).transpose(1, 2)
    return out


def _relative(table: Tensor, frames: int) -> Tensor:
    """[frames, frames, dim]: the vector that belongs to a key's distance from a query."""
    rows = [FARTHEST + key - query for query in range(frames) for key in range(frames)]
    found: Tensor = table.index_select(0, torch.tensor(rows)).unflatten(0, (frames, frames))
    return found


def _halve(signals: Signals, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[n, frames, tokens, dim] → [n, frames / 2, tokens, dim]: of the border, places repeat; of time, the first frame."""
    frames, (rows, cols) = x.shape[1], grid
    padded = [
        (max(t, 0) * rows + min(max(r, 0), rows - 1)) * cols + min(max(c, 0), cols - 1)
        for t in range(-1, frames)
        for r in range(-1, rows + 1)
        for c in range(-1, cols + 1)
    ]
    x = x.flatten(1, 2).index_select(1, torch.tensor(padded)).unflatten(1, (frames + 1, -1))
    return from_clip(conv(signals, name, to_clip(x, (rows + 2, cols + 2)), stride=(2, 1, 1)))


def _group_norm(signals: Signals, name: str, x: Tensor) -> Tensor:
    """Of [n, tokens, dim] over the tokens and the channels of a group, in float32. There are 32 groups; fewer at widths that do
    not make so many of at least 4 channels."""
    dim = x.shape[2]
    groups = max((n for n in range(1, GROUPS + 1) if dim % n == 0 and dim >= 4 * n), default=1)
    grouped = x.float().unflatten(2, (groups, -1))
    centred = grouped - grouped.mean((1, 3), keepdim=True)
    normed = (centred / (centred.pow(2).mean((1, 3), keepdim=True) + EPS).sqrt()).flatten(2)
    out: Tensor = (normed * signals[f"{name}.weight"].float() + signals[f"{name}.bias"].float()).to(x.dtype)
    return out


METHOD = VideoXL
