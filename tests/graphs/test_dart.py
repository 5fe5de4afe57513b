"""DART against a loop over pivots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphs._contract import ReductionError, Site
from graphs.dart import Dart
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid, run

N, FRAMES, DIM = 24, 2, 8
SITE = Site(N, FRAMES, (4, 6), frozenset({"hidden", "keys", "joint_keys"}))


def signals(kind: str) -> dict[str, Array]:
    return {
        "hidden": features(kind, (2, FRAMES, N, DIM)),
        "keys": features(kind, (2, FRAMES, N, 5), 1),
        "joint_keys": features(kind, (2, FRAMES, N, 10), 2),
    }


def one_frame(hidden: Array, keys: Array, keep: int, pivots: int) -> list[int]:
    length = np.abs(keys).sum(-1, dtype=np.float64)
    chosen = best([grid(x, length.mean()) for x in length], pivots)
    kept = list(chosen)
    for place, pivot in enumerate(chosen):
        share = (keep - pivots) // pivots + (place < (keep - pivots) % pivots)
        rest = [i for i in range(len(hidden)) if i not in kept]
        kept += [rest[j] for j in best([-grid(cosine(hidden[pivot], hidden[i])) for i in rest], share)]
    return sorted(kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keep", "pivots"), [(10, None), (2, None), (4, None), (23, None), (11, 3), (7, 6), (9, 1)])
@pytest.mark.parametrize("norm", ["joint_keys", "keys", "hidden"])
def test_against_the_definition(kind: str, keep: int, pivots: int | None, norm: Any) -> None:
    method = Dart(keep=keep, pivots=pivots, norm=norm).fit(SITE)
    assert method.pivots == (pivots or min(4, keep))
    given = signals(kind)
    tokens, index = run(method, given)
    for b in range(2):
        expected = [
            i + f * N
            for f in range(FRAMES)
            for i in one_frame(given["hidden"][b, f], given[norm][b, f], keep, method.pivots)
        ]
        assert index[b].tolist() == expected
        assert (tokens[b] == given["hidden"][b].reshape(-1, DIM)[expected]).all()


def test_a_duplicate_of_the_only_pivot_goes_first() -> None:
    given = signals("random")
    given["joint_keys"][:, :, 5] *= 100
    given["hidden"][:, :, 9] = given["hidden"][:, :, 5]
    index = run(Dart(keep=N - 1, pivots=1).fit(SITE), given)[1]
    assert (index[:, : N - 1] == [i for i in range(N) if i != 9]).all()


def test_keeping_all_is_the_identity() -> None:
    given = signals("random")
    tokens, index = run(Dart(keep_ratio=1).fit(SITE), given)
    assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()


def test_auto_follows_the_site() -> None:
    for offered, norm in ((("keys", "joint_keys"), "joint_keys"), (("keys",), "keys"), ((), "hidden")):
        assert Dart(keep=4).fit(Site(N, signals=frozenset({"hidden", *offered}))).norm == norm


@pytest.mark.parametrize(("pivots", "keep"), [(0, 4), (5, 4)])
def test_refusals(pivots: int, keep: int) -> None:
    with pytest.raises(ReductionError, match=f"`pivots` are among the 4 tokens `keep` leaves; found {pivots}"):
        Dart(keep=keep, pivots=pivots).fit(SITE)
    with pytest.raises(ReductionError, match="needs `joint_keys`"):
        Dart(keep=4, norm="joint_keys").fit(Site(N, signals=frozenset({"hidden"})))
