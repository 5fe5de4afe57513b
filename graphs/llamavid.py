"""Project with LLaMA-VID: of a frame one token that the question asks for, and a few that do not depend on it.

cls [batch, frames, dim], hidden [batch, frames, tokens, dim], instruction_ids and instruction_mask [batch, 128]
→ tokens [batch, frames, 1 + content², llm_dim].

1. A Q-Former, as in `qformer_text`, reads the question, and the image, class token included, behind a layer norm; a linear
   layer takes its queries to the tower's width.
2. *Context*: each of these queries attends to the patches (keys: a linear layer of them, one head; values: the patches
   themselves); the mean of what they found goes through a linear layer.
3. *Content*: the means of content × content equal parts of the raster, through Linear, GELU, Linear.
4. The context token comes first.

Source: Li et al. 2023, "LLaMA-VID: An Image is Worth 2 Tokens in Large Language Models", arXiv:2311.17043.
Knobs:
    content: parts on a side: 1 in models for video (2 tokens per frame), 4 in the image model for 17.
    queries, layers, width, heads, inner, every, vocab, positions: of the Q-Former, as in `qformer_text`.
    weights: the published checkpoint, or its tensors `model.vlm_att_…` and `model.mm_projector.…` alone.
Differs: questions are padded to 128 tokens, and a longer one loses its tail; the official code keeps 256, the last ones. Its
tower, EVA-CLIP-g, is read without the closing norm. Not here are its models that keep all patches, which shorten nothing,
and those whose encoder is a plain BERT, of which none is published.
Position: one each, as if the tower had given so many; the tokens lie in no raster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import Shapes, attention, layer_norm, linear, linear_shapes, mlp, norm_shapes, raster
from graphs._contract import ReductionError, Signals, Site
from graphs._pool import average, pool
from graphs._qformer import GuidedQFormer
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = (
    "llamavid:layers=3,width=16,heads=2,queries=4,vocab=64,positions=128",
    "llamavid:layers=1,width=16,heads=2,queries=4,vocab=64,positions=128,content=4",
)
SWEEP = "llamavid:layers=3,width=64,queries=4,vocab=64"


@dataclass(frozen=True)
class LlamaVid(GuidedQFormer):
    """LLaMA-VID's projector."""

    paper: ClassVar[str] = "Li et al. 2023, arXiv:2311.17043"
    prefixes: ClassVar[tuple[str, ...]] = ("", "model.")
    root: ClassVar[str] = "vlm_att_encoder.bert"
    learned: ClassVar[str] = "vlm_att_query"
    projections: ClassVar[str] = "self"
    norm: ClassVar[str] = "LayerNorm"

    content: int = 1

    def fitted(self, site: Site) -> LlamaVid:
        rows, cols = raster(site)
        if self.content < 1 or rows % self.content or cols % self.content:
            raise ReductionError(f"`content` must divide both sides of {rows} × {cols} tokens; found {self.content}")
        return super().fitted(site)

    def shape(self, site: Site) -> int:
        return 1 + self.content**2

    def trained(self, site: Site) -> Shapes:
        return {
            **self.encoder_shapes(site),
            **norm_shapes("vlm_att_ln", site.dim),
            **linear_shapes("vlm_att_projector", self.width, site.dim),
            **linear_shapes("vlm_att_key_projector", site.dim, site.dim),
            **linear_shapes("vlm_att_val_projector", site.dim, site.llm_dim),
            **linear_shapes("mm_projector.0", site.dim, site.llm_dim),
            **linear_shapes("mm_projector.2", site.llm_dim, site.llm_dim),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        patches, parts = signals["hidden"], (self.content, self.content)
        image = torch.cat([signals["cls"].unsqueeze(1), patches], 1)
        asked = linear(signals, "vlm_att_projector", self.looked(signals, layer_norm(signals, "vlm_att_ln", image)))
        found = attention(asked, linear(signals, "vlm_att_key_projector", patches), patches, 1)
        context = linear(signals, "vlm_att_val_projector", found.mean(1, keepdim=True))
        content = mlp(signals, "mm_projector.0", "mm_projector.2", pool(average(raster(site), parts), patches))
        return torch.cat([context, content], 1)


METHOD = LlamaVid
