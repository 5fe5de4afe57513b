"""PruMerge against a loop written from their description."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from graphs._contract import ReductionError, Site
from graphs.prumerge import PruMerge
from tests.graphs.oracle import KINDS, Array, attention, best, cosine, features, grid, run_merging

N, FRAMES, DIM, DEPTH = 22, 2, 8, 3
KEYS, CLS, COLUMN = f"joint_keys@{DEPTH}", f"joint_cls_attention@{DEPTH}", f"column_attention@{DEPTH}"
WITH_CLS = Site(N, FRAMES, None, frozenset({"hidden", "cls_attention", KEYS, CLS, COLUMN}), DEPTH)
NO_CLS = Site(N, FRAMES, None, frozenset({"hidden", KEYS, COLUMN}), DEPTH)


def signals(kind: str, batch: int = 2) -> dict[str, Array]:
    return {
        "hidden": features(kind, (batch, FRAMES, N, DIM)),
        KEYS: features(kind, (batch, FRAMES, N, 6), 1),
        CLS: attention(kind, (batch, FRAMES, N)),
        COLUMN: attention(kind, (batch, FRAMES, N), 7),
    }


def merged(x: Array, keys: Array, a: Array, centres: list[int], neighbours: int) -> list[Any]:
    """(index, token, size): centres with their neighbours, then the extra token."""
    out: list[Any] = []
    for i in centres:
        others = [j for j in range(len(x)) if j != i]
        near = best([grid(cosine(keys[i], keys[j])) for j in others], neighbours)
        out.append((i, x[i] + sum(a[others[p]] * x[others[p]] for p in near), 1))
    rest = [j for j in range(len(x)) if j not in centres]
    return [*out, (-1, sum(a[j] * x[j] for j in rest), len(rest))]


def chosen(a: Array, count: int, samples: int, order: str) -> list[int]:
    ranked = best([grid(s, 1 / N) for s in a], N)
    outliers, others = ranked[: count - samples], []
    for i in range(samples):
        if i * N // samples not in outliers:
            others.append(i * N // samples)
    for i in ranked:
        if len(outliers) + len(others) < count and i not in outliers + others:
            others.append(i)
    return outliers + sorted(others) if order == "paper" else sorted(outliers + others)


def check(method: PruMerge, kind: str, samples: int, cls: bool) -> None:
    given = signals(kind)
    tokens, index, size = run_merging(method, given)
    for b in range(2):
        expected = []
        for f in range(FRAMES):
            a = given[CLS if cls else COLUMN][b, f]
            assert method.keep is not None
            centres = chosen(a, method.keep - 1, samples, method.order)
            part = merged(given["hidden"][b, f], given[KEYS][b, f], a, centres, method.neighbours)
            expected += [(i if i < 0 else i + f * N, token, s) for i, token, s in part]
        assert index[b].tolist() == [i for i, _, _ in expected]
        assert size[b].tolist() == [s for _, _, s in expected]
        assert size[b].sum() == FRAMES * N
        np.testing.assert_allclose(tokens[b], np.stack([t for _, t, _ in expected]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keep", "neighbours"), [(5, 4), (2, 1), (9, 32), (N, 3)])
@pytest.mark.parametrize("order", ["paper", "raster"])
@pytest.mark.parametrize("cls", [True, False])
def test_prumerge(kind: str, keep: int, neighbours: int, order: Any, cls: bool) -> None:
    method = PruMerge(keep=keep, neighbours=neighbours, order=order).fit(WITH_CLS if cls else NO_CLS)
    assert method.neighbours == min(neighbours, N - 1)
    check(method, kind, 0, cls)


def test_without_attention_a_centre_stays_what_it_is() -> None:
    """The sums are weighted by attention and not normalised."""
    given = signals("random")
    given[CLS] = given[CLS] * np.float32(0)
    tokens, index, _ = run_merging(PruMerge(keep=4).fit(WITH_CLS), given)
    assert index[0, :4].tolist() == [0, 1, 2, -1]
    assert (tokens[0, :3] == given["hidden"][0, 0, :3]).all()
    assert (tokens[0, 3] == 0).all()


def test_the_block_is_right_behind_the_features_if_there_is_one() -> None:
    behind = PruMerge(keep=4).fit(WITH_CLS)
    assert (behind.block, behind.score, behind.needs) == (DEPTH, "cls", ("hidden", KEYS, CLS))
    last = frozenset(s.replace(f"@{DEPTH}", f"@{DEPTH - 1}") for s in NO_CLS.signals)
    without = PruMerge(keep=4).fit(dataclasses.replace(NO_CLS, signals=last))
    assert (without.block, without.score) == (DEPTH - 1, "column")
    assert behind.fit(WITH_CLS) == behind
    assert behind.position == "compact"
    assert behind.merges


def test_float16_accumulates_in_float32() -> None:
    given: dict[str, Any] = {k: v.astype(np.float16) for k, v in signals("random").items()}
    method = PruMerge(keep=7).fit(WITH_CLS)
    tokens, index, _ = run_merging(method, given)
    wide = run_merging(method, {k: v.astype(np.float32) for k, v in given.items()})
    assert tokens.dtype == np.float16
    assert (index == wide[1]).all()
    np.testing.assert_allclose(tokens.astype(np.float32), wide[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (PruMerge(keep=23), WITH_CLS, r"`keep` must be in 1..22"),
        (PruMerge(keep=1), WITH_CLS, "centres and the extra token, so it must be at least 2; found 1"),
        (PruMerge(keep=4, neighbours=0), WITH_CLS, "`neighbours` must be at least 1"),
        (PruMerge(keep=4, score="cls"), NO_CLS, "needs .*`joint_cls_attention@"),
        (PruMerge(keep=4, block=1), WITH_CLS, "needs `joint_keys@1`, `joint_cls_attention@1`"),
    ],
)
def test_refusals(method: PruMerge, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
