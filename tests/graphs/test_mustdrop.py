"""MustDrop's window merging against a loop over windows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.mustdrop import MustDrop
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

ROWS, COLS, DIM = 4, 7, 8
N = ROWS * COLS
SITE = Site(N, 2, (ROWS, COLS), frozenset({"hidden", "size", "cls"}), depth=3)


def reduce(method: MustDrop, hidden: Any, cls: int = 0) -> Reduced:
    signals = {"hidden": torch.from_numpy(hidden), "size": torch.ones(hidden.shape[:2])}
    return method.reduce_frame(0, signals, cls)


def one_frame(x: Array, side: int, keep: int, order: str) -> list[Any]:
    """(index, token, size) per token that is left."""
    cut = []
    for y in range(0, ROWS, side):
        for col in range(0, COLS, side):
            inside = [(y + i) * COLS + col + j for i in range(side) for j in range(side) if col + j < COLS]
            if y + side <= ROWS and len(inside) == side * side:
                cut.append(inside)
    score = [grid(sum(cosine(x[i], x[j]) for i in w for j in w if i != j) / (len(w) * (len(w) - 1))) for w in cut]
    out, left, surplus = [], set(range(N)), N - keep
    for w in best(score, len(cut)):
        if surplus == 0:
            break
        merged = cut[w][-min(len(cut[w]), surplus + 1) :]
        out.append((merged[-1], x[merged].mean(0, dtype=np.float64), len(merged)))
        left -= set(merged)
        surplus -= len(merged) - 1
    out += [(i, x[i], 1) for i in sorted(left)]
    return sorted(out, key=lambda t: t[0]) if order == "raster" else out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize(("window", "keep"), [(3, 12), (3, 15), (3, 20), (2, 10), (2, 12), (2, 27), (4, 13)])
@pytest.mark.parametrize("order", ["paper", "raster"])
def test_against_the_paper(kind: str, cls: int, window: int, keep: int, order: Any) -> None:
    method = MustDrop(keep=keep, window=window, order=order).fit(SITE)
    hidden = features(kind, (2, N + cls, DIM))
    out = reduce(method, hidden, cls)
    assert out.size is not None
    for b in range(2):
        expected = [(0, hidden[b, 0], 1)] * cls
        expected += [(i + cls, t, s) for i, t, s in one_frame(hidden[b, cls:], window, keep, order)]
        assert out.index[b].tolist() == [i for i, _, _ in expected]
        assert out.size[b].tolist() == [s for _, _, s in expected]
        np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([t for _, t, _ in expected]), atol=1e-5)


def test_the_flat_window_merges_first() -> None:
    hidden = features("random", (1, N, DIM))
    flat = [3, 4, 5, 10, 11, 12, 17, 18, 19]
    hidden[0, flat] = hidden[0, 3]
    out = reduce(MustDrop(keep=N - 8).fit(SITE), hidden)
    assert out.index[0].tolist() == [19, *(i for i in range(N) if i not in flat)]
    np.testing.assert_allclose(out.tokens[0, 0], hidden[0, 3], rtol=1e-5)


@pytest.mark.parametrize("cls", [0, 1])
def test_keeping_all_is_the_identity(cls: int) -> None:
    hidden = features("random", (2, N + cls, DIM))
    out = reduce(MustDrop(keep=N).fit(SITE), hidden, cls)
    assert (out.tokens.numpy() == hidden).all()
    assert (out.index == torch.arange(N + cls)).all()


def test_all_in_windows() -> None:
    site = dataclasses.replace(SITE, tokens=16, grid=(4, 4))
    out = reduce(MustDrop(keep=4, window=2, order="raster").fit(site), features("random", (2, 16, DIM)))
    assert out.index.tolist() == [[5, 7, 13, 15]] * 2


def test_float16_accumulates_in_float32() -> None:
    hidden = (features("random", (1, N, DIM)) + 9000).astype(np.float16)
    method = MustDrop(keep=12).fit(SITE)
    out, wide = reduce(method, hidden), reduce(method, hidden.astype(np.float32))
    assert out.tokens.dtype == torch.float16
    torch.testing.assert_close(out.tokens.float(), wide.tokens, rtol=1e-3, atol=1e-3)


def test_knobs() -> None:
    fitted = MustDrop(keep_ratio=0.5).fit(SITE)
    assert (fitted.keep, fitted.rows, fitted.blocks, fitted.position) == (14, 4, (0,), "compact")
    assert fitted.fit(SITE) == fitted
    assert fitted.after(SITE) == Site(14, 2, None, frozenset({"hidden", "cls"}), 3)
    assert fitted.merges and not fitted.proportional
    assert MustDrop(keep=64).fit(dataclasses.replace(SITE, tokens=576, grid=(24, 24))).keep == 64


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (MustDrop(), "exactly one of `keep`"),
        (MustDrop(keep=11), "at least 12, what 2 windows of 3 × 3 leave of 28; found 11"),
        (MustDrop(keep=20, window=5), "at least 28, what 0 windows of 5 × 5 leave of 28; found 20"),
        (MustDrop(keep=20, window=1), "`window` is the side of a square of patches, at least 2; found 1"),
        (MustDrop(keep=20, rows=5), "`rows` must divide the 28 tokens of a frame; found 5"),
    ],
)
def test_refusals(method: MustDrop, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)


def test_it_needs_the_raster() -> None:
    with pytest.raises(ReductionError, match="found no raster"):
        MustDrop(keep=20).fit(dataclasses.replace(SITE, grid=None))
