from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from graphs._contract import ReductionError, Site
from graphs.llava_stf import LlavaStf
from tests.graphs.oracle import trained

PATCHES = frozenset({"hidden", *(f"patches@{b}" for b in range(24))})
SITE = Site(24, 2, (4, 6), PATCHES, 8, dim=6, patch_dim=6, llm_dim=10)


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """LLaVA-STF 7B: CLIP-L of 336 pixels, language model 4096 wide."""
    published = {
        "model.mm_projector_crosslayer.0.weight": (4096, 8192),
        "model.mm_projector_crosslayer.0.bias": (4096,),
        "model.mm_projector_crosslayer.2.weight": (1024, 4096),
        "model.mm_projector_crosslayer.2.bias": (1024,),
        "model.mm_projector.0.weight": (16384, 4096),
        "model.mm_projector.0.bias": (16384,),
        "model.mm_projector.2.weight": (4096, 16384),
        "model.mm_projector.2.bias": (4096,),
    }
    site = Site(576, 1, (24, 24), PATCHES, 23, dim=1024, patch_dim=1024, llm_dim=4096)
    method = LlavaStf().fit(site)
    assert {LlavaStf.prefixes[1] + name: shape for name, shape in method.trained(site).items()} == published
    assert method.needs == ("hidden", *(f"patches@{state - 1}" for state in (21, 18, 15, 12, 9, 6, 3)))
    after = method.after(site)
    assert (after.tokens, after.grid, after.dim) == (144, (12, 12), 4096)


@pytest.mark.parametrize("blocks", [None, (7, 0)])
def test_against_modules_of_the_paper(blocks: tuple[int, ...] | None) -> None:
    """The cells by a sliding window over rows and columns, as its authors write it."""
    method = LlavaStf(blocks=blocks).fit(SITE)
    assert method.blocks == (blocks or (5, 2))
    rng = np.random.default_rng(0)
    signals = {n: torch.from_numpy(rng.standard_normal((2, 2, 24, 6)).astype(np.float32)) for n in method.needs}
    named = {name: torch.from_numpy(w) for name, w in trained(method, SITE).items()}
    found = method.forward(signals | named, SITE)

    fuse = nn.Sequential(nn.Linear(18, 9), nn.GELU(), nn.Linear(9, 6))
    project = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 10))
    model = nn.ModuleDict({"mm_projector_crosslayer": fuse, "mm_projector": project})
    model.load_state_dict(named)
    with torch.no_grad():
        deep, *earlier = (signals[name].flatten(0, 1) for name in method.needs)
        x = fuse(torch.cat([deep, *earlier], -1)).reshape(4, 4, 6, 6)
        expected = project(x.unfold(1, 2, 2).unfold(2, 2, 2).reshape(4, 6, 24)).reshape(2, 2, 6, 10)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_every_block_is_read_in_its_place() -> None:
    method = LlavaStf().fit(SITE)
    rng = np.random.default_rng(1)
    signals = {n: torch.from_numpy(rng.standard_normal((1, 2, 24, 6)).astype(np.float32)) for n in method.needs}
    signals |= {name: torch.from_numpy(w) for name, w in trained(method, SITE).items()}
    one, other = method.needs[1:]
    swapped = signals | {one: signals[other], other: signals[one]}
    assert (method.forward(signals, SITE) - method.forward(swapped, SITE)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "method", "words"),
    [
        ({"tokens": 20, "grid": (4, 5)}, LlavaStf(), "both sides must be even; found 4 × 5"),
        ({"grid": None}, LlavaStf(), "whole raster"),
        ({"signals": frozenset({"hidden"})}, LlavaStf(), "needs `patches@5`, `patches@2`"),
        ({"depth": 3}, LlavaStf(), "`blocks` takes one or more"),
        ({}, LlavaStf(blocks=(3, 3)), r"different blocks of the tower; found \[3, 3\]"),
    ],
)
def test_what_does_not_fit(change: dict[str, object], method: LlavaStf, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        method.fit(dataclasses.replace(SITE, **change))  # type: ignore[arg-type]
