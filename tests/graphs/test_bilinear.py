"""Bilinear resizing against PyTorch's own, and the choice of the layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.bilinear import Bilinear
from tests.graphs.oracle import KINDS, Array, features

FRAMES, DIM = 2, 8


def site(h: int, w: int) -> Site:
    return Site(h * w, FRAMES, (h, w), frozenset({"hidden", "text"}))


def run(method: Bilinear, hidden: Array) -> tuple[Array, Array, Array]:
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is not None
    return out.tokens.numpy(), out.index.numpy(), out.size.numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("h", "w", "out"), [(4, 6, (2, 3)), (5, 7, (3, 4)), (5, 7, (4, 2)), (6, 4, (1, 1)), (9, 9, (4, 4))]
)
def test_against_interpolate(kind: str, h: int, w: int, out: tuple[int, int]) -> None:
    at = site(h, w)
    method = Bilinear(out=out).fit(at)
    hidden = features(kind, (2, FRAMES, h * w, DIM))
    tokens, index, size = run(method, hidden)
    image = torch.from_numpy(hidden).reshape(2 * FRAMES, h, w, DIM).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, out, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(tokens, expected.permute(0, 2, 3, 1).reshape(2, -1, DIM), atol=1e-5)
    np.testing.assert_allclose(size, h * w / (out[0] * out[1]), rtol=1e-6)
    assert method.after(at) == dataclasses.replace(at, tokens=out[0] * out[1], grid=out)
    for i, anchor in enumerate(index[0, : out[0] * out[1]]):
        row, col = divmod(i, out[1])
        spot = np.array([(row + 0.5) * h / out[0] - 0.5, (col + 0.5) * w / out[1] - 0.5])
        far = [np.round(np.abs(np.array(divmod(j, w)) - spot).sum(), 6) for j in range(h * w)]
        assert anchor == int(np.argmin(far))
    assert len(set(index[0].tolist())) == index.shape[1]


@pytest.mark.parametrize(
    ("shape", "given", "out"),
    [
        ((27, 27), {}, (14, 14)),
        ((24, 24), {"keep": 64}, (8, 8)),
        ((24, 24), {"keep_ratio": 1.0}, (24, 24)),
        ((24, 24), {"keep_ratio": 0.001}, (1, 1)),
        ((24, 24), {"keep_ratio": 0.3}, (13, 13)),
        ((10, 20), {"keep_ratio": 0.25}, (5, 10)),
        ((7, 50), {}, (4, 25)),
    ],
)
def test_the_layout_follows_the_rate(shape: tuple[int, int], given: Any, out: tuple[int, int]) -> None:
    fitted = Bilinear(**given).fit(site(*shape))
    assert (fitted.out, fitted.keep) == (out, out[0] * out[1])
    assert fitted.fit(site(*shape)) == fitted


def test_the_same_size_is_the_identity() -> None:
    hidden = features("random", (2, FRAMES, 15, DIM))
    tokens, index, size = run(Bilinear(keep_ratio=1).fit(site(3, 5)), hidden)
    np.testing.assert_allclose(tokens, hidden.reshape(2, -1, DIM), rtol=1e-6)
    assert (index == np.arange(FRAMES * 15)).all()
    assert (size == 1).all()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Bilinear(keep=7), "no raster like 4 × 6 has 7 tokens; the nearest `keep` would be 6 or 12"),
        (Bilinear(out=(5, 6)), r"`out` takes rows\+columns, at most 4\+6 here; found 5\+6"),
        (Bilinear(out=(2,)), r"`out` takes rows\+columns"),
        (Bilinear(out=(2, 3), keep=7), r"`out` = 2\+3 keeps 6 tokens; leave out `keep` = 7"),
        (Bilinear(keep=2, keep_ratio=0.5), "exactly one of"),
    ],
)
def test_refusals(method: Bilinear, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site(4, 6))
