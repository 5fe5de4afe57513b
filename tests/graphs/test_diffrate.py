"""DiffRate against a loop over tokens, written from the paper and its official evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.diffrate import DiffRate, line
from tests.graphs.oracle import KINDS, Array, attention, best, cosine, features, grid

N, DIM = 24, 8
SITE = Site(N, 2, (4, 6), frozenset({"hidden", "size", "cls", "cls_attention"}), depth=3)


def reduce(method: DiffRate, block: int, hidden: Any, cls_attention: Array, size: Array) -> Reduced:
    signals = {"hidden": hidden, "cls_attention": cls_attention, "size": size}
    return method.reduce_frame(block, {k: torch.from_numpy(v) for k, v in signals.items()}, 1)


def one_block(hidden: Array, score: Array, size: Array, p: int, m: int, order: str) -> list[Any]:
    """(index, token, size) per token that is left."""
    n = len(hidden)
    ranked = [0] + [i + 1 for i in best([grid(s, 1 / n) for s in score[1:]], n - 1)]
    targets, sources = ranked[:m], ranked[m:p]
    if order == "raster":
        targets = sorted(targets)
    members: dict[int, list[int]] = {t: [] for t in targets}
    sizes = {t: float(size[t]) for t in targets}
    for s in sources:
        similar = [grid(cosine(hidden[s], hidden[t])) for t in targets[1:]]
        target = targets[1 + best(similar, 1)[0]]
        members[target].append(s)
        sizes[target] += float(size[s]) * max(0, max(similar)) / 4096
    return [(t, np.mean([hidden[t], *hidden[members[t]]], 0, dtype=np.float64), sizes[t]) for t in targets]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["raster", "paper"])
@pytest.mark.parametrize(
    "knobs",
    [{"keep": 3}, {"keep": 17}, {"keep": 24}, {"prune": (25, 14, 14), "merge": (20, 14, 2)}],
)
def test_against_the_paper_block_by_block(kind: str, order: Any, knobs: dict[str, Any]) -> None:
    method = DiffRate(order=order, **knobs).fit(SITE)
    assert method.prune is not None and method.merge is not None
    hidden, size = features(kind, (2, N + 1, DIM)), np.ones((2, N + 1), np.float32)
    for block in method.blocks:
        score = attention(kind, hidden.shape[:2], block)
        out = reduce(method, block, hidden, score, size)
        assert out.size is not None
        for b in range(2):
            expected = one_block(hidden[b], score[b], size[b], method.prune[block], method.merge[block], order)
            assert out.index[b].tolist() == [i for i, _, _ in expected]
            np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([t for _, t, _ in expected]), atol=1e-5)
            np.testing.assert_allclose(out.size[b].numpy(), [s for _, _, s in expected], rtol=1e-5)
        hidden, size = out.tokens.numpy(), out.size.numpy()
    assert hidden.shape[1] == method.merge[-1]
    assert (size[:, 0] == 1).all(), "CLS takes nothing in"


def test_keeping_all_is_the_identity() -> None:
    hidden, score = features("random", (2, N + 1, DIM)), attention("random", (2, N + 1))
    method = DiffRate(keep=N).fit(SITE)
    for block in method.blocks:
        out = reduce(method, block, hidden, score, np.ones((2, N + 1), np.float32))
        assert (out.tokens.numpy() == hidden).all()
        assert (out.index == torch.arange(N + 1)).all()


def test_opposite_tokens_merge_without_taking_size_away() -> None:
    hidden = np.stack([np.ones(4), np.ones(4), -np.ones(4)]).astype(np.float32)[None]
    site = dataclasses.replace(SITE, tokens=2, frames=1, grid=(1, 2), depth=1)
    method = DiffRate(prune=(3,), merge=(2,)).fit(site)
    out = reduce(method, 0, hidden, np.array([[0.2, 0.5, 0.3]], np.float32), np.ones((1, 3), np.float32))
    assert out.size is not None
    assert out.size.tolist() == [[1, 1]]
    assert out.tokens[0].tolist() == [[1] * 4, [0] * 4], "a plain mean"


def test_float16_accumulates_in_float32() -> None:
    hidden, score = features("random", (1, N + 1, DIM)).astype(np.float16), attention("random", (1, N + 1))
    size = np.full((1, N + 1), 60000.0, np.float32)
    method = DiffRate(keep=4).fit(dataclasses.replace(SITE, depth=1))
    out = reduce(method, 0, hidden, score, size)
    wide = reduce(method, 0, hidden.astype(np.float32), score, size)
    assert out.tokens.dtype == torch.float16
    torch.testing.assert_close(out.tokens.float(), wide.tokens, rtol=1e-3, atol=1e-3)


def test_tables() -> None:
    assert line(24, 12, 3) == ((23, 19, 15), (21, 17, 13))
    fitted = DiffRate(keep_ratio=0.5).fit(SITE)
    assert (fitted.keep, fitted.prune, fitted.merge) == (12, (23, 19, 15), (21, 17, 13))
    assert fitted.fit(SITE) == fitted
    assert fitted.blocks == (0, 1, 2)
    assert fitted.after(SITE) == Site(12, 2, None, frozenset({"hidden", "cls"}), 3)
    official = DiffRate(prune=(197, 20, 30), merge=(197, 18, 18)).fit(SITE)
    assert (official.prune, official.merge, official.keep) == ((25, 20, 18), (25, 18, 18), 17), "counts only fall"
    assert official.blocks == (0, 1)
    for tokens in (1, 5, 37):
        for keep in range(1, tokens + 1):
            p, m = line(tokens, keep, 4)
            assert m[-1] == keep + 1
            assert all(a >= b >= c for a, b, c in zip((tokens + 1, *m), p, m, strict=False))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DiffRate(), "exactly one of `keep`"),
        (DiffRate(prune=(9, 9, 9)), "give both or neither"),
        (DiffRate(prune=(9, 9), merge=(9, 9)), "`prune` takes one number for each of the tower's 3 blocks; found 2"),
        (DiffRate(prune=(9, 9, 9), merge=(9, 9, 1)), "`merge` counts CLS .* at least 2; found 1"),
        (DiffRate(prune=(9, 9, 9), merge=(9, 9, 8), keep=8), "this table keeps 7 of 24 patches; leave out `keep` = 8"),
    ],
)
def test_refusals(method: DiffRate, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)


def test_it_needs_cls() -> None:
    with pytest.raises(ReductionError, match="needs `cls_attention`"):
        DiffRate(keep=3).fit(dataclasses.replace(SITE, signals=frozenset({"hidden", "size"})))
