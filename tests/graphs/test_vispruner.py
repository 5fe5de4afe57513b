"""VisPruner against a loop written from its description."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from graphs._contract import ReductionError, Site
from graphs.vispruner import VisPruner
from tests.graphs.oracle import KINDS, Array, attention, best, cosine, features, grid, run

N, FRAMES, DIM = 24, 2, 8
CLS = Site(N, FRAMES, (4, 6), frozenset({"hidden", "cls_attention", "column_attention"}))
NO_CLS = Site(N, FRAMES, (4, 6), frozenset({"hidden", "column_attention"}))


def signals(kind: str, n: int = N) -> dict[str, Array]:
    return {
        "hidden": features(kind, (2, FRAMES, n, DIM)),
        "cls_attention": attention(kind, (2, FRAMES, n)),
        "column_attention": attention(kind, (2, FRAMES, n), 7),
    }


def one_frame(hidden: Array, score: Array, keep: int, ratio: float, per_round: int) -> list[int]:
    n = len(hidden)
    listed = best([grid(s, 1 / n) for s in score], n)
    important, rest = listed[: int(ratio * keep)], listed[int(ratio * keep) :]
    if len(important) == keep:
        return sorted(important)
    while len(rest) > keep - len(important):
        even, odd = rest[0::2], rest[1::2]
        closest = [max(grid(cosine(hidden[i], hidden[j])) for j in odd) for i in even]
        drop = min(per_round, len(rest) - (keep - len(important)), len(even))
        rest = [even[place] for place in best(closest, len(even))[drop:]] + odd
    return sorted(important + rest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "keep", "ratio", "per_round"),
    [
        (24, 6, 0.5, 2),
        (24, 7, 0.3, 8),
        (24, 23, 0.5, 8),
        (24, 5, 1.0, 8),
        (24, 8, 0, 3),
        (21, 4, 0.5, 30),
        (9, 1, 0.5, 1),
    ],
)
@pytest.mark.parametrize("cls", [True, False])
def test_against_the_description(kind: str, n: int, keep: int, ratio: float, per_round: int, cls: bool) -> None:
    site = dataclasses.replace(CLS if cls else NO_CLS, tokens=n, grid=None)
    method = VisPruner(keep=keep, important_ratio=ratio, per_round=per_round).fit(site)
    given = signals(kind, n)
    tokens, index = run(method, given)
    for b in range(2):
        for f in range(FRAMES):
            score = given["cls_attention" if cls else "column_attention"][b, f]
            expected = one_frame(given["hidden"][b, f], score, keep, ratio, per_round)
            part = slice(f * keep, (f + 1) * keep)
            assert (index[b, part] - f * n).tolist() == expected
            assert (tokens[b, part] == given["hidden"][b, f, expected]).all()


def test_of_two_equal_tokens_one_stays() -> None:
    """Half the list doubles the other half; the doubles are always at even places, and go."""
    given = signals("random")
    falling = np.argsort(-given["cls_attention"], -1)
    for b in range(2):
        for f in range(FRAMES):
            given["hidden"][b, f, falling[b, f, ::2]] = given["hidden"][b, f, falling[b, f, 1::2]]
    _, index = run(VisPruner(keep=N // 2, important_ratio=0, per_round=N // 2).fit(CLS), given)
    for b in range(2):
        expected = [sorted(i + f * N for i in falling[b, f, 1::2].tolist()) for f in range(FRAMES)]
        assert index[b].tolist() == [i for frame in expected for i in frame]


def test_important_only_is_top_k() -> None:
    given = signals("random")
    _, index = run(VisPruner(keep=5, important_ratio=1).fit(CLS), given)
    top = np.sort(np.argsort(-given["cls_attention"], -1)[..., :5], -1)
    assert (index == (top + np.arange(FRAMES)[:, None] * N).reshape(2, -1)).all()


def test_keeping_all_is_the_identity() -> None:
    given = signals("random")
    tokens, index = run(VisPruner(keep_ratio=1).fit(CLS), given)
    assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()


def test_auto_follows_the_site() -> None:
    with_cls, without = VisPruner(keep=8).fit(CLS), VisPruner(keep=8).fit(NO_CLS)
    assert (with_cls.score, with_cls.position) == ("cls", "compact")
    assert (without.score, without.needs) == ("column", ("hidden", "column_attention"))
    assert VisPruner(keep=8).fit(dataclasses.replace(NO_CLS, grid_positions=True)).position == "keep"
    assert with_cls.fit(CLS) == with_cls


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (VisPruner(keep=25), CLS, r"`keep` must be in 1..24"),
        (VisPruner(), CLS, "exactly one of `keep`"),
        (VisPruner(keep=4, score="cls"), NO_CLS, "needs `cls_attention`"),
        (VisPruner(keep=4, important_ratio=1.5), CLS, r"`important_ratio` is a share of `keep`, in 0..1; found 1.5"),
        (VisPruner(keep=4, per_round=0), CLS, "`per_round` must be at least 1"),
    ],
)
def test_refusals(method: VisPruner, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
