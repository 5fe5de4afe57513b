"""Project with BLIP-2's Q-Former: learned queries that attend to one another and to the image, layer after layer.

cls [batch, frames, dim], hidden [batch, frames, tokens, dim] → tokens [batch, frames, queries, llm_dim].

1. The queries go through a layer norm, and then through the layers of a BERT: self-attention, in every second layer (the first
   one among them) attention to the image, class token included, and an MLP; a norm behind each.
2. A linear layer to the language model's width.

Source: Li et al. 2023, "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
Models", arXiv:2301.12597. MiniGPT-4 (arXiv:2304.10592) projects with the same.
Knobs, from the checkpoint's config.json:
    queries: num_query_tokens, tokens that leave a frame.
    layers, width, heads, inner, every: num_hidden_layers, hidden_size, num_attention_heads (by default one per 64 of the
        width), intermediate_size (by default four times the width) and cross_attention_frequency of its qformer_config.
    weights: the published checkpoint in Hugging Face's layout, or its tensors `query_tokens`, `qformer.…` and
        `language_projection.…` alone.
Differs: the layout of LAVIS has other names for the same tensors, and is not read.
Position: one each, as if the tower had given so many; the tokens lie in no raster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import Shapes, layer_norm, norm_shapes
from graphs._contract import Signals
from graphs._qformer import EPS, QFormer

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("qformer:layers=3,width=16,heads=2,queries=8", "qformer:layers=2,width=64")
SWEEP = "qformer:layers=3,width=64,queries=8"
NORM = "qformer.layernorm"


@dataclass(frozen=True)
class PlainQFormer(QFormer):
    """BLIP-2's projector."""

    paper: ClassVar[str] = "Li et al. 2023, arXiv:2301.12597"
    prefixes: ClassVar[tuple[str, ...]] = ("", "model.")

    def own_shapes(self) -> Shapes:
        return norm_shapes(NORM, self.width)

    def embedded(self, signals: Signals) -> tuple[Tensor, None]:
        return layer_norm(signals, NORM, signals["query_tokens"], EPS), None


METHOD = PlainQFormer
