"""VScan's first stage against a loop written from its description."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from graphs._contract import ReductionError, Site
from graphs.vscan import VScan
from tests.graphs.oracle import KINDS, Array, attention, best, cosine, features, grid, run_merging

ROWS, COLS, FRAMES, DIM = 5, 6, 2, 8
N = ROWS * COLS
CLS = Site(N, FRAMES, (ROWS, COLS), frozenset({"hidden", "cls_attention", "cls_attention@2"}), 9)
COLUMN = frozenset({"hidden", "column_attention", "column_attention@2"})
NO_CLS = dataclasses.replace(CLS, signals=COLUMN)


def signals(kind: str, batch: int = 2) -> dict[str, Array]:
    names = ("cls_attention", "cls_attention@2", "column_attention", "column_attention@2")
    return {
        "hidden": features(kind, (batch, FRAMES, N, DIM)),
        **{name: attention(kind, (batch, FRAMES, N), seed) for seed, name in enumerate(names)},
    }


def chosen(early: Array, last: Array, keep: int, local: int, side: int) -> list[int]:
    """Greedy, with a counter per window, as published; then the best of the others."""
    down, across = max(1, ROWS // side), max(1, COLS // side)
    limit, counter = math.ceil(local / (down * across)), np.zeros((down, across))
    kept: list[int] = []
    for i in best([grid(s, 1 / N) for s in early], N):
        window = min(i // COLS // side, down - 1), min(i % COLS // side, across - 1)
        if counter[window] < limit and len(kept) < local:
            counter[window] += 1
            kept.append(i)
    for i in best([grid(s, 1 / N) for s in last], N):
        if len(kept) < keep and i not in kept:
            kept.append(i)
    return sorted(kept)


def merged(x: Array, kept: list[int]) -> tuple[Array, list[int]]:
    groups = {i: [i] for i in kept}
    for i in range(len(x)):
        if i not in kept:
            similar = [grid(cosine(x[i], x[j])) for j in kept]
            groups[kept[best(similar, 1)[0]]].append(i)
    return np.stack([x[g].mean(0) for g in groups.values()]), [len(g) for g in groups.values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("keep", "ratio", "side"),
    [(12, 0.5, 2), (9, 0.5, 3), (7, 1.0, 2), (6, 0.0, 2), (20, 0.7, 6), (N, 0.5, 2), (1, 0.5, 1)],
)
@pytest.mark.parametrize("cls", [True, False])
def test_against_the_description(kind: str, keep: int, ratio: float, side: int, cls: bool) -> None:
    given = signals(kind)
    tokens, index, size = run_merging(
        VScan(keep=keep, local_ratio=ratio, window=side).fit(CLS if cls else NO_CLS), given
    )
    name = "cls_attention" if cls else "column_attention"
    for b in range(2):
        for f in range(FRAMES):
            kept = chosen(given[f"{name}@2"][b, f], given[name][b, f], keep, int(ratio * keep), side)
            expected, members = merged(given["hidden"][b, f], kept)
            part = slice(f * keep, (f + 1) * keep)
            assert (index[b, part] - f * N).tolist() == kept
            assert size[b, part].tolist() == members
            np.testing.assert_allclose(tokens[b, part], expected, atol=1e-5)


def test_every_window_gets_its_part() -> None:
    """One window holds all attention of the early block; the others give their share all the same."""
    given = signals("random", 1)
    given["cls_attention@2"][..., [0, 1, COLS, COLS + 1]] += 1
    _, index, _ = run_merging(VScan(keep=6, local_ratio=1, window=2).fit(CLS), given)
    found = {(min(i // COLS // 2, 1), i % COLS // 2) for i in index[0, :6].tolist()}
    assert len(found) == 6


def test_where_windows_hold_too_few_the_global_scan_fills_up() -> None:
    """⌈28 / 6⌉ = 5 a window, but the three upper ones hold only 2 × 2: 27 local tokens."""
    given = signals("random")
    tokens, index, _ = run_merging(VScan(keep=28, local_ratio=1, window=2).fit(CLS), given)
    assert tokens.shape == (2, FRAMES * 28, DIM)
    for b in range(2):
        kept = chosen(given["cls_attention@2"][b, 0], given["cls_attention"][b, 0], 28, 28, 2)
        assert index[b, :28].tolist() == kept


def test_keeping_all_is_the_identity() -> None:
    given = signals("random")
    tokens, index, size = run_merging(VScan(keep_ratio=1).fit(CLS), given)
    assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()
    assert (size == 1).all()


def test_the_block_and_the_window_follow_the_tower() -> None:
    def fitted(depth: int, blocks: Any, **site: Any) -> VScan:
        found = frozenset({"hidden", "column_attention", *(f"column_attention@{b}" for b in blocks)})
        return VScan(keep=4).fit(dataclasses.replace(CLS, depth=depth, signals=found, **site))

    plain, windowed = fitted(23, range(24)), fitted(32, (7, 15, 23, 31), grid_positions=True)
    assert (plain.local_block, plain.window, plain.position, plain.score) == (5, 6, "compact", "column")
    assert (windowed.local_block, windowed.window, windowed.position) == (7, 4, "keep")
    fit = VScan(keep=4).fit(CLS)
    assert (fit.score, fit.rows, fit.space, fit.merges) == ("cls", ROWS, "llm", True)
    assert fit.fit(CLS) == fit


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (VScan(keep=31), CLS, r"`keep` must be in 1..30"),
        (VScan(keep=4, local_ratio=-1), CLS, r"`local_ratio` is a share of `keep`, in 0..1; found -1"),
        (VScan(keep=4, window=0), CLS, "`window` is the side of a window"),
        (VScan(keep=4, local_block=3), CLS, "needs `cls_attention@3`"),
        (VScan(keep=4, score="cls"), NO_CLS, "needs `cls_attention` of a block inside the tower"),
        (VScan(keep=4), dataclasses.replace(CLS, grid=None), "needs the raster of the tokens"),
    ],
)
def test_refusals(method: VScan, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
