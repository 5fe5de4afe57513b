from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from graphs._contract import ReductionError, Site
from graphs.qformer import PlainQFormer
from tests.graphs.compressing import close, normal, weights_of

SITE = Site(20, 2, (4, 5), frozenset({"hidden", "cls"}), dim=10, llm_dim=14)


def of_attention(name: str, seen: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for part, inputs in (("query", 768), ("key", seen), ("value", seen)):
        shapes |= {f"{name}.attention.{part}.weight": (768, inputs), f"{name}.attention.{part}.bias": (768,)}
    shapes |= {f"{name}.output.dense.weight": (768, 768), f"{name}.output.dense.bias": (768,)}
    return shapes | {f"{name}.output.LayerNorm.{part}": (768,) for part in ("weight", "bias")}


def of_mlp(name: str, kind: str = "_query") -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.intermediate{kind}.dense.weight": (3072, 768),
        f"{name}.intermediate{kind}.dense.bias": (3072,),
        f"{name}.output{kind}.dense.weight": (768, 3072),
        f"{name}.output{kind}.dense.bias": (768,),
        f"{name}.output{kind}.LayerNorm.weight": (768,),
        f"{name}.output{kind}.LayerNorm.bias": (768,),
    }


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """blip2-opt-2.7b: EVA-CLIP-g 1408 wide, 257 tokens with CLS, language model 2560 wide."""
    published = {
        "query_tokens": (1, 32, 768),
        "qformer.layernorm.weight": (768,),
        "qformer.layernorm.bias": (768,),
        "language_projection.weight": (2560, 768),
        "language_projection.bias": (2560,),
    }
    for i in range(12):
        layer = f"qformer.encoder.layer.{i}"
        published |= of_attention(f"{layer}.attention", 768) | of_mlp(layer)
        if i in (0, 2, 4, 6, 8, 10):
            published |= of_attention(f"{layer}.crossattention", 1408)
    site = Site(256, 1, (16, 16), SITE.signals, dim=1408, llm_dim=2560)
    method = PlainQFormer().fit(site)
    assert method.trained(site) == published
    after = method.after(site)
    assert (after.tokens, after.grid, after.dim, method.heads) == (32, None, 2560, 12)


@pytest.mark.parametrize(("layers", "every"), [(3, 2), (4, 3), (1, 1)])
@torch.no_grad()
def test_against_hugging_face(layers: int, every: int) -> None:
    method = PlainQFormer(queries=5, layers=layers, width=12, heads=3, inner=20, every=every).fit(SITE)
    weights, x, cls = weights_of(method, SITE), normal(2, 2, 20, 10), normal(2, 2, 10, seed=2)
    config = Blip2QFormerConfig(
        hidden_size=12, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=20, encoder_hidden_size=10,
        cross_attention_frequency=every,
    )  # fmt: skip
    theirs = Blip2QFormerModel(config).eval()
    theirs.load_state_dict({n.removeprefix("qformer."): w for n, w in weights.items() if n.startswith("qformer.")})
    image = torch.cat([cls[:, :, None], x], 2).flatten(0, 1)
    queries = weights["query_tokens"].expand(4, -1, -1)
    out = theirs(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    expected = nn.functional.linear(out, weights["language_projection.weight"], weights["language_projection.bias"])
    found = method.forward({"hidden": x, "cls": cls, **weights}, SITE)
    close(found, expected.unflatten(0, (2, 2)))


@pytest.mark.parametrize(
    ("method", "site", "words"),
    [
        (PlainQFormer(), SITE, "would yield 64 tokens where there are 40"),
        (PlainQFormer(queries=4), Site(20, 1, (4, 5), frozenset({"hidden"}), dim=8, llm_dim=12), "it needs `cls`"),
        (PlainQFormer(queries=4, heads=5), SITE, "must divide the width 768"),
        (PlainQFormer(queries=0), SITE, "`queries` must be at least 1; found 0"),
        (PlainQFormer(queries=4, every=0), SITE, "`every` must be at least 1; found 0"),
    ],
)
def test_what_does_not_fit(method: PlainQFormer, site: Site, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        method.fit(site)
