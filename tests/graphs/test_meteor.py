"""METEOR's two stages against sorting by plain scores."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.meteor import Meteor
from tests.graphs.oracle import KINDS, Array, attention, best, cosine, features, grid

N, DIM = 24, 8
SITE = Site(N, 2, (4, 6), frozenset({"hidden", "size", "cls", "cls_attention"}), depth=4)


def reduce(method: Meteor, block: int, hidden: Array, cls_attention: Array) -> Reduced:
    signals = {"hidden": hidden, "cls_attention": cls_attention, "size": np.ones(hidden.shape[:2], np.float32)}
    return method.reduce_frame(block, {k: torch.from_numpy(v) for k, v in signals.items()}, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keep", "middle"), [(1, None), (7, None), (7, 7), (20, 24), (24, None)])
def test_against_the_description(kind: str, keep: int, middle: int | None) -> None:
    method = Meteor(keep=keep, middle=middle).fit(SITE)
    assert method.middle is not None
    hidden = features(kind, (2, N + 1, DIM))
    for block, left in zip(method.blocks, (method.middle, keep), strict=True):
        score = attention(kind, hidden.shape[:2])
        out = reduce(method, block, hidden, score)
        assert out.size is not None
        for b in range(2):
            patches = hidden[b, 1:]
            mean = patches.mean(0, dtype=np.float64)
            by = (
                [grid(-cosine(p, mean)) for p in patches]
                if block == 1
                else [grid(s, 1 / len(patches)) for s in score[b, 1:]]
            )
            expected = [0, *sorted(i + 1 for i in best(by, left))]
            assert out.index[b].tolist() == expected
            assert (out.tokens[b].numpy() == hidden[b, expected]).all()
            assert (out.size[b] == 1).all()
        hidden = out.tokens.numpy()
    if keep == N:
        assert (hidden == features(kind, (2, N + 1, DIM))).all()


def test_the_usual_goes_first() -> None:
    """A picture of sky with one bird: the bird stays."""
    hidden = np.tile(np.array([1, 0, 0], np.float32), (1, N + 1, 1))
    hidden[0, 17] = [0, 1, 0]
    out = reduce(Meteor(keep=1, middle=2).fit(SITE), 1, hidden, attention("equal", (1, N + 1)))
    assert out.index.tolist() == [[0, 1, 17]]


def test_knobs() -> None:
    fitted = Meteor(keep_ratio=0.25).fit(SITE)
    assert (fitted.keep, fitted.middle, fitted.blocks, fitted.position) == (6, 15, (1, 2), "keep")
    assert fitted.fit(SITE) == fitted
    assert fitted.after(SITE) == Site(6, 2, None, frozenset({"hidden", "cls"}), 4)
    assert not fitted.merges
    assert [Meteor(keep=6).fit(dataclasses.replace(SITE, depth=d)).blocks for d in (2, 3, 23)] == [
        (0, 1),
        (1, 2),
        (7, 15),
    ]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Meteor(), "exactly one of `keep`"),
        (Meteor(keep=5, middle=4), r"`middle` must be in 5..24; found 4"),
        (Meteor(keep=5, shallow=2, deep=2), r"two of the tower's blocks 0..3, in this order; found 2 and 2"),
        (Meteor(keep=5, deep=4), "found 1 and 4"),
    ],
)
def test_refusals(method: Meteor, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
