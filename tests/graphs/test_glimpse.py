"""Glimpse's fuser, probe and choice against modules written from the publication."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graphs._contract import ReductionError, Site
from graphs.glimpse import Glimpse
from tests.graphs.oracle import best, grid
from tests.graphs.oracle_glimpse import New

HEADS, HIDDEN, VISION, LAYERS, GRID = 6, 24, 20, 5, (3, 4)
PATCHES = frozenset(f"patches@{b}" for b in range(6))
INSIDE = frozenset({"hidden", "last_scores", "last_log_attention"})
SITE = Site(
    12, grid=GRID, signals=PATCHES | INSIDE, depth=LAYERS, heads=HEADS, llm_dim=HIDDEN, patch_dim=VISION
)  # fmt: skip
SCORES = {"log_softmax": "last_log_attention", "logits": "last_scores"}


@pytest.fixture(scope="module")
def new() -> New:
    return New(HIDDEN, LAYERS, HEADS, VISION, 3).randomized()


@pytest.fixture(scope="module")
def weights(new: New, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return load_file(new.save(tmp_path_factory.mktemp("glimpse") / "glimpse.safetensors"))


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("kind", ["random", "equal"])
def test_choice(scores: Any, kind: str, new: New, weights: dict[str, Tensor]) -> None:
    rng = np.random.default_rng(0)
    method = Glimpse("-", keep=5, scores=scores, block_list=(4, 1, 3)).fit(SITE)

    def drawn(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape)).float() if kind == "random" else torch.ones(shape)

    states, attention, hidden = [drawn(2, 12, VISION) for _ in range(3)], drawn(2, HEADS, 12), drawn(2, 12, HIDDEN)
    named = {f"patches@{block}": state[:, None] for block, state in zip((4, 1, 3), states, strict=True)}
    signals = {"hidden": hidden, SCORES[scores]: attention, **named, **weights}
    assert {*method.needs} == {SCORES[scores], *named} == {*method.of_tower, SCORES[scores]}
    expected = new.attn_fuser(attention.transpose(1, 2), GRID, states)
    torch.testing.assert_close(method.logits(signals), expected, atol=1e-4, rtol=1e-4)
    if kind == "random":
        assert expected.std() > 0.1, "logits that are all alike show nothing"
        turned = new.attn_fuser(attention.transpose(1, 2), (4, 3), states)
        assert (turned - expected).abs().max() > 1e-2, "the grid has to matter"
    tokens, index, _ = method.forward(method.layers[0], signals)
    for b in range(2):
        assert index[b].tolist() == sorted(best([grid(x) for x in expected[b]], 5))
        assert torch.equal(tokens[b], hidden[b, index[b]])


def test_the_probe(new: New, weights: dict[str, Tensor]) -> None:
    method = Glimpse("-", keep=5, layer=2).fit(SITE)
    assert method.layers == (3,)
    expected = torch.cat([new.embedding(layer) for layer in range(3)])
    torch.testing.assert_close(method.probe(weights, 1e-6), expected, atol=1e-5, rtol=1e-4)
    assert (method.probe(weights, 1e-1) - expected).abs().max() > 1e-2, "the decoder's epsilon"


def test_published_tensors() -> None:
    """Names and shapes of the published 7B weights behind CLIP-L, at all the defaults."""
    signals = INSIDE | {f"patches@{b}" for b in range(23)}
    site = Site(576, grid=(24, 24), signals=signals, depth=32, heads=32, llm_dim=4096, patch_dim=1024)
    method = Glimpse("-", keep_ratio=0.111).fit(site)
    assert (method.keep, method.layer, method.layers, method.block_list) == (64, 21, (22,), (22, 16, 10, 4))
    assert method.fit(site) == method
    with torch.device("meta"):
        published = New(4096, 32, 32, 1024, 4).named_parameters()
    expected = {n: tuple(p.t().shape) if p.ndim == 2 else tuple(p.shape) for n, p in published}
    assert method.trained(site) == expected


@pytest.mark.parametrize(("depth", "layer"), [(32, 21), (40, 26), (28, 18), (36, 23)])
def test_published_layers(depth: int, layer: int) -> None:
    """Of the 7B and 13B models behind CLIP, and of 7B and 3B with 32 tower blocks."""
    signals = INSIDE | {f"patches@{b}" for b in range(32)}
    method = Glimpse("-", keep=3).fit(replace(SITE, depth=depth, signals=signals))
    assert (method.layer, method.block_list) == (layer, (31, 23, 15, 7))


@pytest.mark.parametrize(
    ("knobs", "site", "message"),
    [
        ({}, replace(SITE, grid=None), "grid lost, 6 blocks"),
        ({}, replace(SITE, frames=3), r"12 tokens in 3 frame\(s\), grid 3×4"),
        ({}, replace(SITE, signals=INSIDE), "patches of tower blocks .* 0 blocks"),
        (dict(layer=4), SITE, r"`layer` must be in 0..3, as the model has 5 decoder layers .* found 4"),
        (dict(layer=-1), SITE, r"`layer` must be in 0..3"),
        (dict(block_list=(2, 2)), SITE, r"`block_list` must name every block once; found 2\+2"),
        (dict(block_list=(2, 9)), SITE, "it needs `patches@9`"),
        (dict(rows=5), SITE, "`rows` must divide 12 tokens; found 5"),
        (dict(position="compact"), SITE, "`position` must be keep"),
        (dict(keep_ratio=0.5), SITE, "exactly one of `keep`"),
    ],
)
def test_refusals(knobs: dict[str, Any], site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        Glimpse("-", **{"keep": 3, **knobs}).fit(site)
