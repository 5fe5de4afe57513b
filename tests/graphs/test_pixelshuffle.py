from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from graphs._contract import ReductionError, Site
from graphs.pixelshuffle import PixelShuffle
from tests.graphs.compressing import close, normal, weights_of

SITE = Site(24, 2, (4, 6), frozenset({"hidden"}), dim=8, llm_dim=12)


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """InternVL2-8B: InternViT-300M 1024 wide, language model 4096 wide, 256 tokens per tile of 448 pixels."""
    published = {
        "mlp1.0.weight": (4096,),
        "mlp1.0.bias": (4096,),
        "mlp1.1.weight": (4096, 4096),
        "mlp1.1.bias": (4096,),
        "mlp1.3.weight": (4096, 4096),
        "mlp1.3.bias": (4096,),
    }
    site = Site(1024, 1, (32, 32), SITE.signals, dim=1024, llm_dim=4096)
    method = PixelShuffle().fit(site)
    assert method.trained(site) == published
    after = method.after(site)
    assert (after.tokens, after.grid, after.dim) == (256, (16, 16), 4096)


@pytest.mark.parametrize("version", ["v1", "v2"])
@torch.no_grad()
def test_against_pytorch(version: Literal["v1", "v2"]) -> None:
    """Cell by cell; the first version goes through the columns of cells."""
    method = PixelShuffle(version).fit(SITE)
    weights, x = weights_of(method, SITE), normal(2, 2, 24, 8)
    mlp1 = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 12), nn.GELU(), nn.Linear(12, 12))
    mlp1.load_state_dict({name.removeprefix("mlp1."): w for name, w in weights.items()})
    places = (
        [(r, c) for r in range(2) for c in range(3)]
        if version == "v2"
        else [(r, c) for c in range(3) for r in range(2)]
    )
    square = x.unflatten(2, (4, 6))
    cells = [square[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(2, 2, 32) for r, c in places]
    close(method.forward({"hidden": x, **weights}, SITE), mlp1(torch.stack(cells, 2)))
    assert method.after(SITE).grid == ((2, 3) if version == "v2" else (3, 2))


@pytest.mark.parametrize(("grid", "words"), [((4, 5), "both sides must be even; found 4 × 5"), (None, "whole raster")])
def test_what_does_not_fit(grid: tuple[int, int] | None, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        PixelShuffle().fit(Site(20, 1, grid, SITE.signals, dim=8, llm_dim=12))
