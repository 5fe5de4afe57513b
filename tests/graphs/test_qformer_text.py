from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from graphs._contract import INSTRUCTION_TOKENS, ReductionError, Site
from graphs.qformer_text import InstructQFormer
from tests.graphs.compressing import close, normal, weights_of
from tests.graphs.test_qformer import of_attention, of_mlp

SIGNALS = frozenset({"hidden", "cls", "instruction_ids", "instruction_mask"})
SITE = Site(20, 2, (4, 5), SIGNALS, dim=10, llm_dim=14)


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """instructblip-vicuna-7b: EVA-CLIP-g 1408 wide, language model 4096 wide."""
    published = {
        "query_tokens": (1, 32, 768),
        "qformer.embeddings.word_embeddings.weight": (30523, 768),
        "qformer.embeddings.position_embeddings.weight": (512, 768),
        "qformer.embeddings.layernorm.weight": (768,),
        "qformer.embeddings.layernorm.bias": (768,),
        "language_projection.weight": (4096, 768),
        "language_projection.bias": (4096,),
    }
    for i in range(12):
        layer = f"qformer.encoder.layer.{i}"
        published |= of_attention(f"{layer}.attention", 768) | of_mlp(layer) | of_mlp(layer, "")
        if i % 2 == 0:
            published |= of_attention(f"{layer}.crossattention", 1408)
    site = Site(256, 1, (16, 16), SIGNALS, dim=1408, llm_dim=4096)
    method = InstructQFormer().fit(site)
    assert method.trained(site) == published
    assert method.after(site).tokens == 32


@torch.no_grad()
def test_against_hugging_face() -> None:
    """Two questions of different lengths; theirs are not padded, and asked alone."""
    method = InstructQFormer(queries=5, layers=3, width=12, heads=3, inner=20, vocab=30, positions=130).fit(SITE)
    weights, x, cls = weights_of(method, SITE), normal(2, 2, 20, 10), normal(2, 2, 10, seed=2)
    config = InstructBlipQFormerConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=3, num_attention_heads=3, intermediate_size=20,
        encoder_hidden_size=10, cross_attention_frequency=2, max_position_embeddings=130,
    )  # fmt: skip
    theirs = InstructBlipQFormerModel(config).eval()
    theirs.load_state_dict({n.removeprefix("qformer."): w for n, w in weights.items() if n.startswith("qformer.")})
    ids = torch.randint(1, 30, (2, INSTRUCTION_TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, length in enumerate((3, INSTRUCTION_TOKENS)):
        mask[row, :length] = 1
    signals = {"hidden": x, "cls": cls, "instruction_ids": ids, "instruction_mask": mask}
    found = method.forward({**signals, **weights}, SITE)
    for row in range(2):
        for frame in range(2):
            out = theirs(
                input_ids=ids[row : row + 1, : mask[row].sum()],
                query_embeds=weights["query_tokens"],
                encoder_hidden_states=torch.cat([cls[row, frame, None], x[row, frame]])[None],
            ).last_hidden_state[:, :5]
            w, b = (weights[f"language_projection.{part}"] for part in ("weight", "bias"))
            close(found[row, frame], nn.functional.linear(out, w, b)[0])
    other = method.forward({**signals, "instruction_ids": ids.flip(0), **weights}, SITE)
    assert (found - other).abs().max() > 1e-2, "the question matters"


@pytest.mark.parametrize(
    ("method", "signals", "words"),
    [
        (InstructQFormer(queries=4), frozenset({"hidden", "cls"}), "needs `instruction_ids`, `instruction_mask`"),
        (InstructQFormer(queries=4, positions=100), SIGNALS, "`positions` must be at least 128"),
        (InstructQFormer(), SIGNALS, "would yield 64 tokens where there are 40"),
    ],
)
def test_what_does_not_fit(method: InstructQFormer, signals: frozenset[str], words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        method.fit(Site(20, 2, (4, 5), signals, dim=10, llm_dim=14))
