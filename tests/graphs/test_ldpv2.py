from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.ldpv2 import LdpV2
from tests.graphs.oracle import trained

SITE = Site(24, 2, (4, 6), frozenset({"hidden"}), dim=8, llm_dim=12)


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """MobileVLM_V2-1.7B: CLIP-L of 336 pixels, language model 2048 wide."""
    published = {
        "model.mm_projector.mlp.mlp.0.weight": (2048, 1024),
        "model.mm_projector.mlp.mlp.0.bias": (2048,),
        "model.mm_projector.mlp.mlp.2.weight": (2048, 2048),
        "model.mm_projector.mlp.mlp.2.bias": (2048,),
        "model.mm_projector.peg.peg.0.weight": (2048, 1, 3, 3),
        "model.mm_projector.peg.peg.0.bias": (2048,),
    }
    site = Site(576, 1, (24, 24), frozenset({"hidden"}), dim=1024, llm_dim=2048)
    method = LdpV2().fit(site)
    assert {LdpV2.prefixes[1] + name: shape for name, shape in method.trained(site).items()} == published
    after = method.after(site)
    assert (after.tokens, after.grid, after.dim) == (144, (12, 12), 2048)


def test_against_loops() -> None:
    method, x = LdpV2().fit(SITE), np.random.default_rng(0).standard_normal((2, 2, 24, 8)).astype(np.float32)
    weights = trained(method, SITE)
    named = {name: torch.from_numpy(w) for name, w in weights.items()}
    found = method.forward({"hidden": torch.from_numpy(x), **named}, SITE).numpy()
    assert found.shape == (2, 2, 6, 12)
    np.testing.assert_allclose(found, expected(x, weights), atol=1e-5)


def expected(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    """Token by token."""
    erf = np.vectorize(math.erf)
    h = x @ w["mlp.mlp.0.weight"].T + w["mlp.mlp.0.bias"]
    h = (h * (1 + erf(h / 2**0.5)) / 2) @ w["mlp.mlp.2.weight"].T + w["mlp.mlp.2.bias"]
    kernel, bias = w["peg.peg.0.weight"][:, 0], w["peg.peg.0.bias"]
    out = np.zeros((*x.shape[:2], 2, 3, 12), np.float32)
    pooled = np.zeros_like(out)
    for r in range(2):
        for c in range(3):
            corner = 2 * r * 6 + 2 * c
            pooled[:, :, r, c] = sum(h[:, :, corner + i] for i in (0, 1, 6, 7)) / 4
    for r in range(2):
        for c in range(3):
            out[:, :, r, c] = pooled[:, :, r, c] + bias
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    if 0 <= r + dr < 2 and 0 <= c + dc < 3:
                        out[:, :, r, c] += pooled[:, :, r + dr, c + dc] * kernel[:, dr + 1, dc + 1]
    return out.reshape(*x.shape[:2], 6, 12)


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (Site(20, 1, (4, 5), SITE.signals, dim=8, llm_dim=12), "both sides must be even; found 4 × 5"),
        (Site(20, 1, None, SITE.signals, dim=8, llm_dim=12), "whole raster"),
        (Site(24, 1, (4, 6), SITE.signals, llm_dim=12), "widths"),
    ],
)
def test_what_does_not_fit(site: Site, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        LdpV2().fit(site)
