"""One-shot ToMe against a loop over pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from graphs._contract import ReductionError, Site
from graphs.tome_once import ToMeOnce, plan
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid, run_merging

N, FRAMES, DIM = 21, 2, 8
SITE = Site(N, FRAMES, (3, 7), frozenset({"hidden", "keys"}))


def signals(kind: str) -> dict[str, Array]:
    return {"hidden": features(kind, (2, FRAMES, N, DIM)), "keys": features(kind, (2, FRAMES, N, 5), 1)}


def one_round(parts: list[Any], r: int) -> list[Any]:
    """parts: (anchor, members, token, metric); a group's vectors are the plain means of its members."""
    a, b = parts[::2], parts[1::2]
    scores = [[grid(cosine(x[3], y[3])) for y in b] for x in a]
    goes = best([max(row) for row in scores], r)
    joined: dict[int, list[Any]] = {j: [part] for j, part in enumerate(b)}
    for i in goes:
        joined[best(scores[i], 1)[0]].append(a[i])
    out = [part for i, part in enumerate(a) if i not in goes]
    for j, group in joined.items():
        count = sum(len(p[1]) for p in group)
        token, metric = (sum(p[k].astype(np.float64) * len(p[1]) for p in group) / count for k in (2, 3))
        out.append((b[j][0], [m for p in group for m in p[1]], token, metric))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["keys", "hidden"])
@pytest.mark.parametrize(("keep", "rounds"), [(11, None), (3, None), (9, 5), (20, None), (1, None)])
@pytest.mark.parametrize("order", ["paper", "raster"])
def test_against_the_definition(kind: str, metric: Any, keep: int, rounds: int | None, order: Any) -> None:
    method = ToMeOnce(keep=keep, rounds=rounds, metric=metric, order=order).fit(SITE)
    assert method.rounds is not None
    given = signals(kind)
    tokens, index, size = run_merging(method, given)
    for s in range(2):
        expected = []
        for f in range(FRAMES):
            x, m = given["hidden"][s, f], given[metric][s, f]
            parts = [(i, [i], x[i], m[i]) for i in range(N)]
            for r in plan(N, keep, method.rounds):
                parts = one_round(parts, r)
            parts = sorted(parts, key=lambda p: p[0]) if order == "raster" else parts
            expected += [(i + f * N, x[members].mean(0), len(members)) for i, members, _, _ in parts]
        assert index[s].tolist() == [i for i, _, _ in expected]
        assert size[s].tolist() == [n for _, _, n in expected]
        np.testing.assert_allclose(tokens[s], np.stack([t for _, t, _ in expected]), atol=1e-5)


def test_keeping_all_is_the_identity() -> None:
    given = signals("random")
    tokens, index, size = run_merging(ToMeOnce(keep_ratio=1).fit(SITE), given)
    assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()
    assert (size == 1).all()


def test_of_equal_tokens_a_mean_is_the_token() -> None:
    given = signals("equal")
    tokens, _, size = run_merging(ToMeOnce(keep=4).fit(SITE), given)
    np.testing.assert_allclose(tokens, np.broadcast_to(given["hidden"][:1, 0, :1], tokens.shape), rtol=1e-6)
    assert size.sum() == 2 * FRAMES * N


@pytest.mark.parametrize("tokens", [1, 2, 7, 21, 576])
def test_a_plan_reaches_its_goal_and_at_most_halves(tokens: int) -> None:
    for keep in range(1, tokens + 1, max(1, tokens // 40)):
        fewest = math.ceil(math.log2(tokens / keep))
        for rounds in (fewest, fewest + 1, fewest + 9):
            left = tokens
            for r in plan(tokens, keep, rounds):
                assert 1 <= r <= left // 2
                left -= r
            assert left == keep
    assert plan(576, 64, 4) == [128, 192, 128, 64]
    assert plan(21, 9, 5) == [3, 3, 2, 2, 2]


def test_refusals() -> None:
    with pytest.raises(ReductionError, match=r"`rounds` must be at least 3, .* 21 tokens are to become 4; found 2"):
        ToMeOnce(keep=4, rounds=2).fit(SITE)
    with pytest.raises(ReductionError, match="needs `keys`"):
        ToMeOnce(keep=4).fit(Site(N, signals=frozenset({"hidden"})))
