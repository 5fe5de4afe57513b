"""SAINT against a loop that drops patches one round after another."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.saint import Saint, rounds
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

N, DIM = 24, 8
SITE = Site(N, 2, (4, 6), frozenset({"hidden", "keys", "size", "cls"}), depth=3)


def reduce(method: Saint, block: int, hidden: Array, keys: Array, cls: int) -> Reduced:
    signals = {"hidden": hidden, "keys": keys, "size": np.ones(hidden.shape[:2], np.float32)}
    return method.reduce_frame(block, {k: torch.from_numpy(v) for k, v in signals.items()}, cls)


def survivors(keys: Array, keep: int) -> list[int]:
    """The published loop: the divisor of a round is what the round before dropped."""
    left, drop = list(range(len(keys))), 16
    while len(left) > keep:
        drop = min(len(left) - keep, max(1, len(left) // drop))
        scores = [grid(sum(cosine(keys[i], keys[j]) for j in left) / len(left)) for i in left]
        goes = {left[i] for i in best(scores, drop)}
        left = [i for i in left if i not in goes]
    return left


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize("keep", [1, 7, 20, 23])
def test_against_the_published_loop(kind: str, cls: int, keep: int) -> None:
    method = Saint(keep=keep).fit(SITE)
    (block,) = method.blocks
    hidden, keys = features(kind, (2, N + cls, DIM)), features(kind, (2, N + cls, 5), 1)
    out = reduce(method, block, hidden, keys, cls)
    assert out.size is not None
    for b in range(2):
        expected = [0] * cls + [i + cls for i in survivors(keys[b, cls:], keep)]
        assert out.index[b].tolist() == expected
        assert (out.tokens[b].numpy() == hidden[b, expected]).all()
        assert (out.size[b] == 1).all()


def test_a_crowd_is_thinned_first() -> None:
    """Copies of one patch go; patches unlike all others stay."""
    keys = np.eye(N, dtype=np.float32)[None]
    keys[0, 4:16] = keys[0, 4]
    out = reduce(Saint(keep=14).fit(SITE), 2, features("random", (1, N, DIM)), keys, 0)
    assert out.index[0].tolist() == [0, 1, 2, 3, 14, 15, *range(16, 24)]


def test_several_blocks() -> None:
    method = Saint(schedule=(0, 5, 2)).fit(SITE)
    assert (method.keep, method.blocks) == (17, (1, 2))
    hidden = features("random", (1, N, DIM))
    first = reduce(method, 1, hidden, hidden, 0)
    second = reduce(method, 2, first.tokens.numpy(), first.tokens.numpy(), 0)
    left = survivors(hidden[0], 19)
    assert first.index[0].tolist() == left
    assert second.index[0].tolist() == survivors(hidden[0, left], 17)


def test_rounds_of_the_paper() -> None:
    assert list(rounds(576, 375)) == [36, 15, 35, 14, 34, 13, 33, 12, 9]
    assert all(sum(rounds(n, k)) == n - k for n in (1, 5, 21, 64, 577) for k in range(1, n + 1))


def test_knobs() -> None:
    paper = dataclasses.replace(SITE, tokens=576, depth=23)
    assert Saint(keep=375).fit(paper).blocks == (19,)
    assert [Saint(keep=9).fit(dataclasses.replace(SITE, depth=d)).blocks for d in (1, 2, 6)] == [(0,), (1,), (4,)]
    fitted = Saint(keep_ratio=0.5).fit(SITE)
    assert (fitted.keep, fitted.schedule, fitted.position) == (12, (0, 0, 12), "keep")
    assert fitted.fit(SITE) == fitted
    assert fitted.after(SITE) == Site(12, 2, None, frozenset({"hidden", "cls"}), 3)
    assert Saint(keep=N).fit(SITE).blocks == ()
    assert not fitted.merges


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Saint(), "exactly one of `keep`"),
        (Saint(keep=25), "`keep` must be in 1..24"),
        (Saint(schedule=(2, 2)), "one number for each of the tower's 3 blocks; found 2"),
        (Saint(schedule=(20, 4, 0)), r"may remove 0..3 of the 4 that reach block 1; found 4"),
        (Saint(schedule=(2, 0, 0), keep=3), "this `schedule` keeps 22 of 24 tokens; leave out `keep` = 3"),
    ],
)
def test_refusals(method: Saint, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
