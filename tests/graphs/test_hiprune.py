"""HiPrune against a loop written from its description."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from graphs._contract import ReductionError, Site
from graphs.hiprune import HiPrune
from tests.graphs.oracle import KINDS, Array, attention, best, features, grid, run

ROWS, COLS, FRAMES, DIM = 6, 5, 2, 4
N = ROWS * COLS
SITE = Site(N, FRAMES, (ROWS, COLS), frozenset({"hidden", "column_attention", "column_attention@3"}), 10)


def signals(kind: str, batch: int = 2) -> dict[str, Array]:
    return {
        "hidden": features(kind, (batch, FRAMES, N, DIM)),
        "column_attention": attention(kind, (batch, FRAMES, N)),
        "column_attention@3": attention(kind, (batch, FRAMES, N), 7),
    }


def one_frame(middle: Array, last: Array, keep: int, anchors: int) -> list[int]:
    chosen = set()
    for anchor in best([grid(s, 1 / N) for s in middle], anchors):
        for step in (0, -1, 1, -COLS, COLS):
            chosen.add(min(max(anchor + step, 0), N - 1))
    for i in best([grid(s, 1 / N) for s in last], N):
        if len(chosen) < keep:
            chosen.add(i)
    return sorted(chosen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("keep", "alpha", "anchors"), [(10, 0.1, 0), (25, 0.12, 1), (12, 0.8, 2), (8, 1.0, 1), (3, 1.0, 0), (30, 0.5, 3)]
)
def test_against_the_description(kind: str, keep: int, alpha: float, anchors: int) -> None:
    given = signals(kind)
    tokens, index = run(HiPrune(keep=keep, alpha=alpha).fit(SITE), given)
    for b in range(2):
        for f in range(FRAMES):
            middle, last = given["column_attention@3"][b, f], given["column_attention"][b, f]
            expected = one_frame(middle, last, keep, anchors)
            part = slice(f * keep, (f + 1) * keep)
            assert (index[b, part] - f * N).tolist() == expected
            assert (tokens[b, part] == given["hidden"][b, f, expected]).all()


@pytest.mark.parametrize(
    ("anchor", "expected"),
    [
        (12, [7, 11, 12, 13, 17]),
        (0, [0, 1, 5]),
        (14, [9, 13, 14, 15, 19]),
        (29, [24, 28, 29]),
        (27, [22, 26, 27, 28, 29]),
    ],
)
def test_neighbours_of_an_anchor(anchor: int, expected: list[int]) -> None:
    """Inside, at a corner, at the end of a row (the next one's first), in the last corner, in the last row."""
    given = signals("equal", 1)
    given["column_attention@3"][..., anchor] = 1
    given["column_attention"][..., :5] *= np.float32(0.5)
    _, index = run(HiPrune(keep=5, alpha=1).fit(SITE), given)
    rest = [i for i in [*range(5, N), *range(5)] if i not in expected]
    assert index[0, :5].tolist() == sorted(expected + rest[: 5 - len(expected)])


def test_without_anchors_it_is_top_k_of_the_last_block() -> None:
    given = signals("random")
    _, index = run(HiPrune(keep=7, alpha=0).fit(SITE), given)
    top = np.sort(np.argsort(-given["column_attention"], -1)[..., :7], -1)
    assert (index == (top + np.arange(FRAMES)[:, None] * N).reshape(2, -1)).all()


def test_keeping_all_is_the_identity() -> None:
    given = signals("random")
    tokens, index = run(HiPrune(keep_ratio=1).fit(SITE), given)
    assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()


def test_the_block_follows_the_tower() -> None:
    def fitted(depth: int, blocks: range | tuple[int, ...]) -> int | None:
        found = frozenset({"hidden", "column_attention", *(f"column_attention@{b}" for b in blocks)})
        return HiPrune(keep=4).fit(dataclasses.replace(SITE, depth=depth, signals=found)).object_block

    assert fitted(23, range(24)) == 8, "the paper's layer 9"
    assert fitted(32, (7, 15, 23, 31)) == 15, "its layer 16, where four blocks attend to all tokens"


def test_what_fit_resolves() -> None:
    method = HiPrune(keep_ratio=0.2).fit(SITE)
    assert (method.keep, method.object_block, method.rows, method.position) == (6, 3, ROWS, "compact")
    assert method.fit(SITE) == method
    assert HiPrune(keep=4).fit(dataclasses.replace(SITE, grid_positions=True)).position == "keep"
    assert HiPrune(keep=4, rows=3).fit(dataclasses.replace(SITE, grid=None)).rows == 3


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (HiPrune(keep=31), SITE, r"`keep` must be in 1..30"),
        (HiPrune(keep=4, alpha=2), SITE, r"`alpha` is a share of `keep`, in 0..1; found 2"),
        (HiPrune(keep=4, object_block=4), SITE, "needs `column_attention@4`"),
        (HiPrune(keep=4), dataclasses.replace(SITE, grid=None), "needs the raster of the tokens"),
        (HiPrune(keep=4, rows=4), SITE, "`rows` must divide the 30 tokens of a frame; found 4"),
        (HiPrune(keep=4), dataclasses.replace(SITE, signals=frozenset({"hidden"})), "`column_attention` of a block"),
    ],
)
def test_refusals(method: HiPrune, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
