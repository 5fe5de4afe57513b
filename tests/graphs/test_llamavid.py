from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from graphs._contract import INSTRUCTION_TOKENS, ReductionError, Site
from graphs.llamavid import LlamaVid
from tests.graphs.compressing import close, normal, weights_of
from tests.graphs.test_qformer import of_attention, of_mlp

SIGNALS = frozenset({"hidden", "cls", "instruction_ids", "instruction_mask"})
SITE = Site(24, 2, (4, 6), SIGNALS, dim=10, llm_dim=14)


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """llama-vid-7b-full-224-video-fps-1: EVA-CLIP-g 1408 wide, language model 4096 wide."""
    published = {
        "model.vlm_att_query": (1, 32, 768),
        "model.vlm_att_ln.weight": (1408,),
        "model.vlm_att_ln.bias": (1408,),
        "model.vlm_att_projector.weight": (1408, 768),
        "model.vlm_att_projector.bias": (1408,),
        "model.vlm_att_key_projector.weight": (1408, 1408),
        "model.vlm_att_key_projector.bias": (1408,),
        "model.vlm_att_val_projector.weight": (4096, 1408),
        "model.vlm_att_val_projector.bias": (4096,),
        "model.mm_projector.0.weight": (4096, 1408),
        "model.mm_projector.0.bias": (4096,),
        "model.mm_projector.2.weight": (4096, 4096),
        "model.mm_projector.2.bias": (4096,),
        "model.vlm_att_encoder.bert.embeddings.word_embeddings.weight": (30523, 768),
        "model.vlm_att_encoder.bert.embeddings.position_embeddings.weight": (512, 768),
        "model.vlm_att_encoder.bert.embeddings.LayerNorm.weight": (768,),
        "model.vlm_att_encoder.bert.embeddings.LayerNorm.bias": (768,),
    }
    for i in range(12):
        layer = f"model.vlm_att_encoder.bert.encoder.layer.{i}"
        attend = of_attention(f"{layer}.attention", 768)
        if i % 2 == 0:
            attend |= of_attention(f"{layer}.crossattention", 1408)
        published |= {name.replace("attention.attention.", "attention.self."): s for name, s in attend.items()}
        published |= of_mlp(layer) | of_mlp(layer, "")
    site = Site(256, 1, (16, 16), SIGNALS, dim=1408, llm_dim=4096)
    method = LlamaVid().fit(site)
    assert {LlamaVid.prefixes[1] + name: shape for name, shape in method.trained(site).items()} == published
    assert method.after(site).tokens == 2
    assert LlamaVid(content=4).fit(site).after(site).tokens == 17


@pytest.mark.parametrize("content", [1, 2])
@torch.no_grad()
def test_against_hugging_face_and_the_formula(content: int) -> None:
    """The Q-Former is InstructBLIP's under other names; behind it equation 1 of the paper, frame by frame."""
    given = LlamaVid(queries=5, layers=3, width=12, heads=3, inner=20, vocab=30, positions=130, content=content)
    method = given.fit(SITE)
    weights, x, cls = weights_of(method, SITE), normal(2, 2, 24, 10), normal(2, 2, 10, seed=2)
    config = InstructBlipQFormerConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=3, num_attention_heads=3, intermediate_size=20,
        encoder_hidden_size=10, cross_attention_frequency=2, max_position_embeddings=130,
    )  # fmt: skip
    theirs, prefix = InstructBlipQFormerModel(config).eval(), "vlm_att_encoder.bert."
    renamed = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    renamed = {n.replace(".self.", ".attention.").replace("embeddings.LayerNorm", "embeddings.layernorm"): w for n, w in renamed.items()}  # fmt: skip
    theirs.load_state_dict(renamed)

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])

    ids = torch.randint(1, 30, (2, INSTRUCTION_TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, length in enumerate((3, INSTRUCTION_TOKENS)):
        mask[row, :length] = 1
    signals = {"hidden": x, "cls": cls, "instruction_ids": ids, "instruction_mask": mask}
    found = method.forward({**signals, **weights}, SITE)
    assert found.shape == (2, 2, 1 + content**2, 14)
    for row in range(2):
        for frame in range(2):
            patches = x[row, frame]
            image = torch.cat([cls[row, frame, None], patches])[None]
            normed = nn.functional.layer_norm(image, (10,), weights["vlm_att_ln.weight"], weights["vlm_att_ln.bias"])
            out = theirs(
                input_ids=ids[row : row + 1, : mask[row].sum()],
                query_embeds=weights["vlm_att_query"],
                encoder_hidden_states=normed,
            ).last_hidden_state[0, :5]
            asked = linear("vlm_att_projector", out)
            shares = torch.softmax(asked @ linear("vlm_att_key_projector", patches).T / 10**0.5, -1)
            context = linear("vlm_att_val_projector", (shares @ patches).mean(0))
            planes = patches.T.reshape(1, 10, 4, 6)
            parts = nn.functional.avg_pool2d(planes, (4 // content, 6 // content)).flatten(2)[0].T
            plain = linear("mm_projector.2", nn.functional.gelu(linear("mm_projector.0", parts)))
            close(found[row, frame], torch.cat([context[None], plain]))
    other = method.forward({**signals, "instruction_ids": ids.flip(0), **weights}, SITE)
    assert (found - other)[:, :, 0].abs().max() > 1e-3, "the question matters to the context token"
    assert torch.equal(found[:, :, 1:], other[:, :, 1:])


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        (LlamaVid(content=3), {}, "`content` must divide both sides of 4 × 6 tokens; found 3"),
        (LlamaVid(), {"grid": None}, "whole raster"),
        (LlamaVid(), {"signals": frozenset({"hidden"})}, "needs `cls`, `instruction_ids`, `instruction_mask`"),
        (LlamaVid(positions=64), {}, "`positions` must be at least 128"),
    ],
)
def test_what_does_not_fit(method: LlamaVid, change: dict[str, object], words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        method.fit(dataclasses.replace(SITE, **change))  # type: ignore[arg-type]
