"""MovieChat's consolidation against a loop with a shrinking list, as published."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.moviechat import MovieChat
from tests.graphs.oracle import KINDS, Array, best, features, grid

T, P, DIM = 7, 6, 5
SITE = Site(P, T, (2, 3), frozenset({"hidden", "cls"}))


def run(method: MovieChat, hidden: Array) -> tuple[Array, Array, Array]:
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is not None
    return out.tokens.numpy(), out.index.numpy(), out.size.numpy()


def consolidate(hidden: Array, slots: int) -> list[tuple[int, Array, int]]:
    """(first frame, tokens, frames merged) per slot."""
    hidden = hidden.astype(np.float64)
    unit = np.mean([(frame.mean(0) ** 2).sum() for frame in hidden]) + 1e-12
    memory = [(t, frame, 1) for t, frame in enumerate(hidden)]
    while len(memory) > slots:
        similar = [grid((a[1] @ b[1].T).mean(), unit) for a, b in pairwise(memory)]
        at = best(similar, 1)[0]
        (head, a, m), (_, b, n) = memory[at], memory[at + 1]
        memory[at : at + 2] = [(head, (a + b) / 2, m + n)]
    return memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 2, 4, 6])
def test_against_the_published_loop(kind: str, slots: int) -> None:
    hidden = features(kind, (2, T, P, DIM))
    tokens, index, size = run(MovieChat(keep_frames=slots).fit(SITE), hidden)
    for b in range(2):
        memory = consolidate(hidden[b], slots)
        assert index[b].tolist() == [head * P + p for head, _, _ in memory for p in range(P)]
        assert size[b].tolist() == [n for _, _, n in memory for _ in range(P)]
        np.testing.assert_allclose(tokens[b], np.concatenate([x for _, x, _ in memory]), atol=1e-5)
    assert (size.sum(1) == T * P).all()


def test_halves_weigh_alike() -> None:
    """Three equal frames of x merge before a frame of y joins: y weighs one half."""
    x, y = np.eye(2, dtype=np.float32)
    hidden = np.stack([x, x, x, y])[None, :, None].repeat(P, 2)
    tokens, _, size = run(MovieChat(keep_frames=1).fit(Site(P, 4, None, frozenset({"hidden"}))), hidden)
    assert (tokens == 0.5).all()
    assert (size == 4).all()


def test_keeping_all_is_the_identity() -> None:
    hidden = features("random", (2, T, P, DIM))
    tokens, index, size = run(MovieChat(keep_ratio=1.0).fit(SITE), hidden)
    assert (tokens == hidden.reshape(2, -1, DIM)).all()
    assert (index == np.arange(T * P)).all()
    assert (size == 1).all()


def test_counts() -> None:
    fitted = MovieChat().fit(SITE)
    assert (fitted.keep_frames, fitted.keep, fitted.position) == (2, 2 * P, "compact")
    assert fitted.fit(SITE) == fitted
    assert [MovieChat(keep_ratio=r).fit(SITE).keep_frames for r in (1.0, 0.5, 0.01)] == [7, 3, 1]
    after = fitted.after(SITE)
    assert (after.frames, after.tokens, after.grid, after.signals) == (2, P, (2, 3), frozenset({"hidden"}))


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (MovieChat(keep_frames=8), SITE, "`keep_frames` must be in 1..7 on this clip; found 8"),
        (MovieChat(keep=13), SITE, "`keep` = 13 cannot be reached on this clip; the nearest would be 12 or 18"),
        (MovieChat(keep_frames=2, keep=18), SITE, "`keep_frames` = 2 keeps 12 of 42 tokens; leave out `keep` = 18"),
        (MovieChat(), Site(P, 1, None, frozenset({"hidden"})), "needs at least 2 frames; found 1"),
    ],
)
def test_refusals(method: MovieChat, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
