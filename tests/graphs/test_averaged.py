"""M3 and DeCo: average pooling, kept to what models were trained for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs._pool import Averaged
from graphs.avgpool import AvgPool
from graphs.deco import DeCo
from graphs.m3 import M3
from tests.graphs.oracle import features

CLIP = Site(576, 1, (24, 24), frozenset({"hidden"}))


def pooled(method: Averaged, site: Site) -> tuple[np.ndarray, torch.Tensor]:
    """Ours, and the planes [n, dim, rows, cols] it came from."""
    x = torch.from_numpy(features("random", (2, site.frames, site.tokens, 3)))
    out = method.forward({"hidden": x})
    assert out.size is not None
    grid = method.after(site).grid
    assert grid is not None
    assert torch.allclose(out.size.sum(1), torch.tensor(float(site.total)))
    planes = x.flatten(0, 1).transpose(1, 2).unflatten(2, site.grid)
    return out.tokens.unflatten(1, (site.frames, *grid)).flatten(0, 1).permute(0, 3, 1, 2).numpy(), planes


@pytest.mark.parametrize("count", [576, 144, 36, 9, 1])
def test_m3_pools_as_its_authors_do(count: int) -> None:
    kernel = int(np.sqrt(576 / count))
    method = M3(keep=count).fit(CLIP)
    ours, planes = pooled(method, CLIP)
    np.testing.assert_allclose(ours, torch.nn.functional.avg_pool2d(planes, kernel, kernel), atol=1e-6)
    assert method.space == "llm"
    other = AvgPool(kernel=kernel, space="llm").fit(CLIP)
    assert other.after(CLIP) == method.after(CLIP)
    x = {"hidden": torch.from_numpy(features("random", (1, 1, 576, 3)))}
    for a, b in zip(method.forward(x), other.forward(x), strict=True):
        assert a is not None and torch.equal(a, b)


def test_m3_elsewhere_than_on_24_by_24() -> None:
    wide = Site(48, 2, (4, 12), frozenset({"hidden"}))
    ours, planes = pooled(M3(keep=3).fit(wide), wide)
    np.testing.assert_allclose(ours, torch.nn.functional.avg_pool2d(planes, 4), atol=1e-6)
    ours, planes = pooled(M3(keep=1).fit(wide), wide)
    np.testing.assert_allclose(ours, planes.mean((2, 3), keepdim=True), atol=1e-6)
    assert M3(keep_ratio=0.2).fit(wide).keep == 12


@pytest.mark.parametrize(("grid", "keep"), [((24, 24), None), ((27, 27), 144), ((24, 24), 100), ((5, 7), 16)])
def test_deco_pools_adaptively(grid: tuple[int, int], keep: int | None) -> None:
    site = Site(grid[0] * grid[1], 2, grid, frozenset({"hidden"}))
    method = DeCo(keep=keep).fit(site)
    side = round((keep or 144) ** 0.5)
    assert (method.keep, method.space, method.after(site).grid) == (side**2, "tower", (side, side))
    ours, planes = pooled(method, site)
    np.testing.assert_allclose(ours, torch.nn.functional.adaptive_avg_pool2d(planes, (side, side)), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "site", "words"),
    [
        (M3(keep=64), CLIP, "`keep` must be one of 1, 9, 36, 144, 576 on 24 × 24 tokens; found 64"),
        (M3(), CLIP, "exactly one of `keep`"),
        (DeCo(keep=10), CLIP, "`keep` must be one of 1, 4, 9"),
        (DeCo(), Site(64, 1, (8, 8), CLIP.signals), "must be in 1..64"),
        (DeCo(raster=(3, 5), keep=4), CLIP, "`raster` must be rows and columns"),
        (M3(keep=9), Site(576, 1, None, CLIP.signals), "raster of the tokens, which is lost here"),
    ],
)
def test_what_does_not_fit(method: Averaged, site: Site, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        method.fit(site)
