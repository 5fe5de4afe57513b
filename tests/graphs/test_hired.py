"""HiRED against a loop written from its description."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs._quota import quotas
from graphs.hired import HiRED
from tests.graphs.oracle import KINDS, Array, attention, best, features, grid, run

ROWS, COLS, FRAMES, DIM = 4, 5, 5, 6
N = ROWS * COLS
CLS = Site(N, FRAMES, (ROWS, COLS), frozenset({"hidden", "cls_attention", "cls_attention@0", "cls_attention@3"}), 5)
NO_CLS = dataclasses.replace(CLS, signals=frozenset({"hidden", "column_attention", "column_attention@2"}))


def signals(kind: str, batch: int = 2, frames: int = FRAMES) -> dict[str, Array]:
    names = ("cls_attention", "cls_attention@0", "column_attention", "column_attention@2")
    return {
        "hidden": features(kind, (batch, frames, N, DIM)),
        **{name: attention(kind, (batch, frames, N), seed) for seed, name in enumerate(names)},
    }


def shared_out(counts: list[float], total: int) -> list[int]:
    """Largest remainder over shares on the documented grid."""
    parts = [grid(c / sum(counts) if sum(counts) else 1 / len(counts)) for c in counts]
    exact = [p * total / sum(parts) for p in parts]
    out = [int(e) for e in exact]
    for g in best([grid(e - int(e)) for e in exact], total - sum(out)):
        out[g] += 1
    return out


def one_sample(late: Array, early: Array, keep: int, alpha: float, tiles: tuple[int, int]) -> list[int]:
    count = len(late) - 1
    whole = min(max(int(alpha * keep), keep - count * N), N)
    in_tile = [0] * count
    for place in best([grid(a, 1 / N) for a in early[0]], int((1 - alpha) * N)):
        row, col = (place // COLS + 0.5) / ROWS, (place % COLS + 0.5) / COLS
        in_tile[int(row * tiles[0]) * tiles[1] + int(col * tiles[1])] += 1
    budgets = [whole, *shared_out([float(c) for c in in_tile], keep - whole)]
    assert sum(budgets) == keep
    score = [[grid(a, 1 / N) for a in frame] for frame in late]
    kept = {f * N + i for f, budget in enumerate(budgets) for i in best(score[f], budget)}
    flat = [s for frame in score for s in frame]
    for i in best(flat, len(flat)):
        if len(kept) < keep:
            kept.add(i)
    return sorted(kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("keep", "alpha", "tiles"),
    [
        (20, 0.5, None),
        (33, 0.5, (2, 2)),
        (17, 0.2, (4, 1)),
        (95, 0.1, (1, 4)),
        (60, 1.0, None),
        (30, 0.0, None),
        (7, 0.9, None),
    ],
)
@pytest.mark.parametrize("cls", [True, False])
def test_against_the_description(kind: str, keep: int, alpha: float, tiles: Any, cls: bool) -> None:
    method = HiRED(keep=keep, alpha=alpha, tiles=tiles).fit(CLS if cls else NO_CLS)
    given = signals(kind)
    tokens, index = run(method, given)
    late, early = ("cls_attention", "cls_attention@0") if cls else ("column_attention", "column_attention@2")
    for b in range(2):
        expected = one_sample(given[late][b], given[early][b], keep, alpha, tiles or (2, 2))
        assert index[b].tolist() == expected
        assert (tokens[b] == given["hidden"][b].reshape(-1, DIM)[expected]).all()


def test_budget_goes_where_the_whole_image_is_attended() -> None:
    """All early attention in the lower left quarter: its tile gets what the whole image leaves."""
    given = signals("random", 1)
    given["cls_attention@0"][0, 0] = 0
    given["cls_attention@0"][0, 0, [10, 11, 15, 16]] = 0.25
    _, index = run(HiRED(keep=16, alpha=0.8).fit(CLS), given)
    assert np.bincount(index[0] // N, minlength=FRAMES).tolist() == [12, 0, 0, 4, 0]


def test_a_single_frame_is_top_k() -> None:
    site = dataclasses.replace(CLS, frames=1)
    method, given = HiRED(keep=6, budget_block=3).fit(site), signals("random", frames=1)
    assert (method.budget_block, method.tiles, method.needs) == (None, (1, 0), ("hidden", "cls_attention"))
    _, index = run(method, given)
    assert (index == np.sort(np.argsort(-given["cls_attention"][:, 0], -1)[:, :6], -1)).all()


def test_keeping_all_is_the_identity() -> None:
    given = signals("random")
    tokens, index = run(HiRED(keep_ratio=1).fit(CLS), given)
    assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()


@pytest.mark.parametrize(("groups", "total"), [(3, 64), (32, 9216), (100, 4000), (7, 1)])
def test_quotas_sum_to_the_total(groups: int, total: int) -> None:
    """Also where rounding of many shares adds up to more than a token."""
    share = np.random.default_rng(0).random((2000, groups)).astype(np.float32)
    out = quotas(torch.from_numpy(share), total)
    assert (out.sum(-1) == total).all()
    assert (out >= 0).all()
    for row, given in zip(out[:20].tolist(), share.tolist(), strict=False):
        assert row == shared_out(given, total)


def test_what_fit_resolves() -> None:
    method = HiRED(keep_ratio=0.2).fit(CLS)
    assert (method.keep, method.score, method.budget_block, method.tiles, method.rows) == (20, "cls", 0, (2, 2), ROWS)
    assert method.fit(CLS) == method
    assert method.position == "compact"
    assert method.after(CLS).total == 20
    assert HiRED(keep=9).fit(dataclasses.replace(CLS, frames=7)).tiles == (2, 3)
    assert HiRED(keep=9).fit(dataclasses.replace(CLS, frames=8)).tiles == (1, 7)
    assert HiRED(keep=9).fit(NO_CLS).budget_block == 2


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (HiRED(keep=101), CLS, r"`keep` must be in 1..100, as there are 100 tokens in 5 frames"),
        (HiRED(keep=9, alpha=1.1), CLS, r"`alpha` is the whole image's part of the budget, in 0..1; found 1.1"),
        (HiRED(keep=9, tiles=(3, 2)), CLS, r"`tiles` are rows \+ columns of the 4 frames .* as in 2\+2; found 3\+2"),
        (HiRED(keep=9, tiles=(4,)), CLS, "found 4"),
        (HiRED(keep=9, budget_block=1), CLS, "needs `cls_attention@1`"),
        (HiRED(keep=9, score="cls"), NO_CLS, "needs `cls_attention` of a block inside the tower"),
    ],
)
def test_refusals(method: HiRED, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
