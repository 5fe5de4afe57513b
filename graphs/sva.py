"""Project with a spatial vision aggregator: one learned query per cell of the raster, which attends to the tokens there.

hidden [batch, frames, tokens, dim] → tokens [batch, frames, tokens / side², llm_dim], with a learned vector behind every row.

1. The features are stretched to `grid` (bilinear); Linear, GELU, Linear to `width`, a layer norm. Their mean is the context.
2. Every cell of side × side tokens has the same learned query. `depth` times: query and context side by side, a linear layer;
   attention (16 heads, layer norms in front of every projection, no biases) to the cell's tokens, whose learned place in the cell is
   added; a layer norm; Linear, GELU, Linear; all this is added to the query.
3. Linear, GELU, Linear to the language model's width.

Source: LongVU's connector (Shen et al. 2024, arXiv:2410.17434), which is that of Tong et al. 2024, "Cambrian-1: A Fully Open,
Vision-Centric Exploration of Multimodal LLMs", arXiv:2406.16860, in the layout of LongVU's official code.
Knobs:
    side: of a cell; published: 2, from 24 × 24 to 12 × 12 queries. grid: rows+columns of step 1. By default 24+24 of 27+27,
        SigLIP's at 384 pixels, and else what the tower gives.
    depth, width: of the aggregator, 3 and 1024. row_ends: off leaves the learned vectors at row ends (`image_newline`) out, so that
        the tokens are a raster for reductions behind, such as `longvu`.
    weights: a checkpoint of the official code trained with one tower, or its tensors `model.vision_sampler_0.…`, `model.vision_query`,
        `model.mm_projector_aux_0.…`, `model.mm_projector.…` and `model.image_newline` alone.
Differs: one tower. The official code joins several towers' tokens in one softmax (LongVU's published checkpoints SigLIP's and DINOv2's,
Cambrian-1's four); what the model learnt of one is nothing without the others, and a model here has one tower, so such
checkpoints are refused. The official code pads images to a square and masks the padding; here an image fills the raster.
Several query groups, and Cambrian-1's aggregators between decoder layers, are refused, too: LongVU has neither.
Position: one each, as if the tower had given so many.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import (
    PerFrameCompressor,
    Shapes,
    Stretched,
    attention,
    cells,
    layer_norm,
    linear,
    linear_shapes,
    mlp,
    norm_shapes,
    stacked,
)
from graphs._contract import ReductionError, Signals, Site
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("sva:width=32", "sva:width=32,depth=1,row_ends=off")
SWEEP = "sva:width=64,depth=1"
HEADS = 16
SAMPLER = "vision_sampler_0.layers"


@dataclass(frozen=True)
class Sva(Stretched, PerFrameCompressor):
    """LongVU's projector, of one tower."""

    paper: ClassVar[str] = "Shen et al. 2024, arXiv:2410.17434"
    prefixes: ClassVar[tuple[str, ...]] = ("", "model.")

    side: int = 2
    grid: tuple[int, ...] | None = None
    depth: int = 3
    width: int = 1024
    row_ends: bool = True

    def fitted(self, site: Site) -> Sva:
        grid = self.wanted(site)
        if len(grid) != 2 or min(grid) < 1 or self.side < 1 or any(length % self.side for length in grid):
            raise ReductionError(
                f"`grid` takes rows+columns, which `side` must divide; found {'+'.join(map(str, grid))} and {self.side}"
            )
        if self.depth < 1 or self.width < 1 or self.width % HEADS:
            raise ReductionError(
                f"`depth` must be at least 1 and `width` a multiple of its {HEADS} heads; found {self.depth} and {self.width}"
            )
        return replace(self, grid=grid)

    def shape(self, site: Site) -> tuple[int, int] | int:
        rows, cols = (length // self.side for length in self.lengths)
        return rows * (cols + 1) if self.row_ends else (rows, cols)

    def trained(self, site: Site) -> Shapes:
        wide, llm = self.width, site.llm_dim
        layer: Shapes = {
            **linear_shapes("proj_context", wide, wide, bias=False),
            **linear_shapes("proj_in", 2 * wide, wide, bias=False),
            **linear_shapes("proj_out.linear_1", wide, wide, bias=False),
            **linear_shapes("proj_out.linear_2", wide, wide, bias=False),
            **norm_shapes("norm", wide),
            **linear_shapes("cross_attn.o_proj", wide, wide, bias=False),
        }
        for name in ("q_proj", "k_proj_0", "v_proj_0"):
            layer |= norm_shapes(f"cross_attn.{name}.0", wide)
            layer |= linear_shapes(f"cross_attn.{name}.1", wide, wide, bias=False)
        if self.side > 1:
            layer["pos_embed_0"] = (self.side**2, wide)
        made: Shapes = {
            "vision_query": (1, wide),
            **linear_shapes("mm_projector_aux_0.0", site.dim, wide),
            **linear_shapes("mm_projector_aux_0.2", wide, wide),
            **norm_shapes("mm_projector_aux_0.3", wide),
            **linear_shapes("mm_projector.0", wide, llm),
            **linear_shapes("mm_projector.2", llm, llm),
        }
        for n in range(self.depth):
            made |= stacked(f"{SAMPLER}.{n}", layer)
        return made | ({"image_newline": (llm,)} if self.row_ends else {})

    def strange(self, names: Collection[str]) -> str | None:
        towers = sum(f"mm_projector_aux_{n}.0.weight" in names for n in range(len(names)))
        if towers > 1:
            return (
                f"its aggregator joins the tokens of {towers} vision towers, and this model has one. Take a checkpoint that was "
                "trained with one tower"
            )
        if any(name.startswith(("vision_sampler_1.", "vision_sampler_layers.")) for name in names):
            return "it has several groups of queries, or aggregators inside the language model, which are not supported"
        layers = {name[len(SAMPLER) + 1 :].partition(".")[0] for name in names if name.startswith(f"{SAMPLER}.")}
        if len(layers) > self.depth:
            return f"its aggregator has {len(layers)} layers. Say so: depth={len(layers)}"
        return None

    def compress(self, signals: Signals, site: Site) -> Tensor:
        x = self.stretched(signals["hidden"], site)
        x = layer_norm(signals, "mm_projector_aux_0.3", mlp(signals, "mm_projector_aux_0.0", "mm_projector_aux_0.2", x))
        own = cells(x, self.lengths, self.side)
        context = x.mean(1, keepdim=True).expand(-1, own.shape[1], -1)
        query = torch.zeros_like(context) + signals["vision_query"]
        for n in range(self.depth):
            query = query + _aggregated(signals, f"{SAMPLER}.{n}", query, context, own)
        x = mlp(signals, "mm_projector.0", "mm_projector.2", query)
        if self.row_ends:
            rows = x.unflatten(1, (self.lengths[0] // self.side, -1))
            ends = torch.zeros_like(rows[:, :, :1]) + signals["image_newline"]
            x = torch.cat([rows, ends], 2).flatten(1, 2)
        return x


def _aggregated(signals: Signals, name: str, query: Tensor, context: Tensor, own: Tensor) -> Tensor:
    """What a layer adds to the queries [n, cells, width]; context [n, cells, width]; own [n, cells, side², width]."""
    q = torch.cat([query, linear(signals, f"{name}.proj_context", context)], -1)
    q = linear(signals, f"{name}.proj_in", q)
    if f"{name}.pos_embed_0" in signals:
        own = own + signals[f"{name}.pos_embed_0"]
    queries, tokens = q.flatten(0, 1).unsqueeze(1), own.flatten(0, 1)
    found = attention(
        _normed(signals, f"{name}.cross_attn.q_proj", queries),
        _normed(signals, f"{name}.cross_attn.k_proj_0", tokens),
        _normed(signals, f"{name}.cross_attn.v_proj_0", tokens),
        HEADS,
    )
    found = linear(signals, f"{name}.cross_attn.o_proj", found).squeeze(1).unflatten(0, q.shape[:2])
    q = layer_norm(signals, f"{name}.norm", q + found)
    return mlp(signals, f"{name}.proj_out.linear_1", f"{name}.proj_out.linear_2", q)


def _normed(signals: Signals, name: str, x: Tensor) -> Tensor:
    return linear(signals, f"{name}.1", layer_norm(signals, f"{name}.0", x))


METHOD = Sva
