"""Average pooling against PyTorch's own, and the choice of the kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs._pool import middles
from graphs.avgpool import AvgPool
from tests.graphs.oracle import KINDS, Array, features

FRAMES, DIM = 2, 8


def site(h: int, w: int) -> Site:
    return Site(h * w, FRAMES, (h, w), frozenset({"hidden", "keys"}))


def run(method: AvgPool, hidden: Array) -> tuple[Array, Array, Array]:
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is not None
    return out.tokens.numpy(), out.index.numpy(), out.size.numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("h", "w", "kernel"), [(4, 6, 2), (6, 6, 3), (5, 7, 2), (4, 6, 6), (3, 5, 1), (1, 9, 4)])
def test_against_adaptive_pooling(kind: str, h: int, w: int, kernel: int) -> None:
    at = site(h, w)
    method = AvgPool(kernel=kernel).fit(at)
    hidden = features(kind, (2, FRAMES, h * w, DIM))
    tokens, index, size = run(method, hidden)
    cells = method.after(at).grid
    assert cells == (-(-h // kernel), -(-w // kernel))
    image = torch.from_numpy(hidden).reshape(2 * FRAMES, h, w, DIM).permute(0, 3, 1, 2)
    expected = torch.nn.functional.adaptive_avg_pool2d(image, cells).permute(0, 2, 3, 1).reshape(2, -1, DIM)
    np.testing.assert_allclose(tokens, expected, atol=1e-6)
    if h % kernel == w % kernel == 0:
        plain = torch.nn.functional.avg_pool2d(image, kernel).permute(0, 2, 3, 1).reshape(2, -1, DIM)
        np.testing.assert_allclose(tokens, plain, atol=1e-6)
        assert (size == kernel**2).all()
    np.testing.assert_allclose(size.sum(1), FRAMES * h * w, rtol=1e-6)
    for row, col, anchor in ((i // cells[1], i % cells[1], a) for i, a in enumerate(index[0, : cells[0] * cells[1]])):
        middle = np.array([(row + 0.5) * h / cells[0] - 0.5, (col + 0.5) * w / cells[1] - 0.5])
        far = [np.round(np.abs(np.array(divmod(i, w)) - middle).sum(), 6) for i in range(h * w)]
        assert anchor == int(np.argmin(far))
    assert len(set(index[0].tolist())) == index.shape[1]


@pytest.mark.parametrize(
    ("given", "kernel", "keep"),
    [
        ({"keep": 144}, 2, 144),
        ({"keep": 1}, 24, 1),
        ({"keep_ratio": 1.0}, 1, 576),
        ({"keep_ratio": 0.3}, 2, 144),
        ({"keep_ratio": 0.001}, 24, 1),
        ({"keep_ratio": 0.9}, 1, 576),
        ({"kernel": 5}, 5, 25),
    ],
)
def test_the_kernel_follows_the_rate(given: Any, kernel: int, keep: int) -> None:
    fitted = AvgPool(**given).fit(site(24, 24))
    assert (fitted.kernel, fitted.keep, fitted.rows) == (kernel, keep, 24)
    assert fitted.fit(site(24, 24)) == fitted


def test_kernel_one_is_the_identity() -> None:
    hidden = features("random", (2, FRAMES, 15, DIM))
    tokens, index, size = run(AvgPool(keep_ratio=1).fit(site(3, 5)), hidden)
    np.testing.assert_allclose(tokens, hidden.reshape(2, -1, DIM), rtol=1e-6)
    assert (index == np.arange(FRAMES * 15)).all()
    assert (size == 1).all()


def test_middles() -> None:
    assert middles((3, 3), (1, 1)) == [4]
    assert middles((5, 4), (3, 2)) == [0, 2, 8, 10, 16, 18]


def test_what_is_left_behind_it() -> None:
    at = site(4, 6)
    after = AvgPool(kernel=2).fit(at).after(at)
    assert after == dataclasses.replace(at, tokens=6, grid=(2, 3), signals=frozenset({"hidden"}))
    assert (AvgPool(keep=1).space, AvgPool(keep=1, space="llm").space) == ("tower", "llm")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (AvgPool(), "one of `kernel`, `keep` and `keep_ratio`; found none"),
        (AvgPool(keep=7), "`keep` must be what a kernel makes of 4 × 6: 1, 2, 4, 6, 24; found 7"),
        (AvgPool(kernel=7), r"`kernel` must be in 1\.\.6 on 4 × 6 tokens; found 7"),
        (AvgPool(kernel=2, keep=24), "`kernel` = 2 keeps 6 tokens; leave out `keep` = 24"),
        (AvgPool(keep_ratio=1.5), "`keep_ratio` is the fraction"),
        (AvgPool(kernel=2, rows=5), "`rows` must divide the 24 tokens"),
    ],
)
def test_refusals(method: AvgPool, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site(4, 6))


def test_a_lost_raster_is_refused() -> None:
    with pytest.raises(ReductionError, match="raster"):
        AvgPool(kernel=2).fit(dataclasses.replace(site(4, 6), grid=None))
