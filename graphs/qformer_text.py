"""Project with InstructBLIP's Q-Former: BLIP-2's, whose queries also attend to the question and so look for what it asks.

cls [batch, frames, dim], hidden [batch, frames, tokens, dim], instruction_ids and instruction_mask [batch, 128]
→ tokens [batch, frames, queries, llm_dim].

1. The queries, and behind them the question's word and position embeddings, go through a layer norm.
2. The layers of a BERT, as in `qformer`: self-attention of queries and question together, without padding; queries alone
   attend to the image; an MLP for queries and one for the question.
3. A linear layer takes the queries to the language model's width.

Source: Dai et al. 2023, "InstructBLIP: Towards General-purpose Vision-Language Models with Instruction Tuning",
arXiv:2305.06500.
Knobs, from the checkpoint's config.json:
    queries: num_query_tokens, tokens that leave a frame.
    layers, width, heads, inner, every: num_hidden_layers, hidden_size, num_attention_heads (by default one per 64 of the
        width), intermediate_size (by default four times the width) and cross_attention_frequency of its qformer_config.
    vocab, positions: its vocab_size and max_position_embeddings.
    weights: the published checkpoint in Hugging Face's layout, or its tensors `query_tokens`, `qformer.…` and
        `language_projection.…` alone.
Differs: questions are padded to 128 tokens, and cut there as in the official code; Hugging Face's processor does not cut.
Position: one each, as if the tower had given so many; the tokens lie in no raster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphs._qformer import GuidedQFormer

EXAMPLES = ("qformer_text:layers=3,width=16,heads=2,queries=8,vocab=64,positions=128",)
SWEEP = "qformer_text:layers=3,width=64,queries=8,vocab=64"


@dataclass(frozen=True)
class InstructQFormer(GuidedQFormer):
    """InstructBLIP's projector."""

    paper: ClassVar[str] = "Dai et al. 2023, arXiv:2305.06500"
    prefixes: ClassVar[tuple[str, ...]] = ("", "model.")


METHOD = InstructQFormer
