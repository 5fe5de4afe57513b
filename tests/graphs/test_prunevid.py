"""PruneVid's part before the language model against loops written from the paper."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.prunevid import PruneVid
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid
from tests.graphs.test_chatunivi import Item, clusters

T, P, DIM = 6, 12, 5
SITE = Site(P, T, (3, 4), frozenset({"hidden"}))


def merged(items: list[Item], count: int) -> list[Item]:
    if len(items) == count:
        return items
    centres, parts = clusters([x for _, x, _ in items], count, 7, raster=False)
    return [
        (items[c][0], np.mean([items[i][1] for i in part], 0), sum(items[i][2] for i in part))
        for c, part in zip(centres, parts, strict=True)
    ]


def expected(clip: Array, cut: int, static: int, still: int, moving: int) -> list[Item]:
    length, out = len(clip) // cut, []
    for s in range(cut):
        segment = clip[s * length : (s + 1) * length].astype(np.float64)
        alike = []
        for p in range(P):
            pairs = itertools.combinations(range(length), 2)
            alike.append(grid(np.mean([cosine(segment[i, p], segment[j, p]) for i, j in pairs])))
        place = sorted(best(alike, static))
        first = s * length
        out += merged([(first * P + p, segment[:, p].mean(0), float(length)) for p in place], still) if static else []
        for f in range(length):
            rest = [((first + f) * P + p, segment[f, p], 1.0) for p in range(P) if p not in place]
            out += merged(rest, moving) if rest else []
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("cut", "ratio", "still", "moving", "order"),
    [
        (2, 0.5, 3, 3, "paper"),
        (3, 0.5, 2, 2, "raster"),
        (1, 0.7, 4, 2, "paper"),
        (2, 0.0, 0, 5, "paper"),
        (3, 1.0, 4, 0, "raster"),
    ],
)
def test_against_the_paper(kind: str, cut: int, ratio: float, still: int, moving: int, order: str) -> None:
    keep = cut * (still + T // cut * moving)
    method = PruneVid(keep=keep, segments=cut, static_ratio=ratio, order=order).fit(SITE)  # type: ignore[arg-type]
    hidden = features(kind, (2, T, P, DIM))
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is not None
    for b in range(2):
        items = expected(hidden[b], cut, int(ratio * P), still, moving)
        items = sorted(items, key=lambda item: item[0]) if order == "raster" else items
        assert out.index[b].tolist() == [i for i, _, _ in items]
        assert out.size[b].tolist() == [n for _, _, n in items]
        np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([x for _, x, _ in items]), atol=1e-5)
    assert (out.size.sum(1) == T * P).all()


def test_counts() -> None:
    where = Site(144, 16, (12, 12), frozenset({"hidden"}))
    fitted = PruneVid().fit(where)
    assert (fitted.segments, fitted.keep) == (4, 4 * (36 + 4 * 36))
    assert fitted.fit(where) == fitted
    assert fitted.position == "compact"
    for ratio in (0.05, 0.2, 0.5):
        keep = PruneVid(keep_ratio=ratio).fit(where).keep
        assert keep is not None
        assert abs(keep - ratio * where.total) <= 2
    assert PruneVid(keep_ratio=1.0).fit(where).keep == 4 * (72 + 4 * 72), "averaging static places is always done"


def test_without_static_places_keeping_all_is_the_identity() -> None:
    hidden = features("random", (2, T, P, DIM))
    method = PruneVid(static_ratio=0.0, keep_ratio=1.0).fit(SITE)
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert (out.tokens.numpy() == hidden.reshape(2, -1, DIM)).all()
    assert (out.index.numpy() == np.arange(T * P)).all()


def test_places_that_stand_still_are_averaged() -> None:
    """Half of the places keep their token over all frames, the others turn: the first half is static."""
    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((1, T, P, DIM)).astype(np.float32)
    hidden[:, :, 1::2] = hidden[:, :1, 1::2]
    out = PruneVid(segments=1, keep_ratio=1.0).fit(SITE).forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is not None
    assert out.index[0, :6].tolist() == [1, 3, 5, 7, 9, 11]
    assert out.size[0, :6].tolist() == 6 * [float(T)]
    np.testing.assert_allclose(out.tokens[0, :6].numpy(), hidden[0, 0, 1::2], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PruneVid(segments=4), r"`segments` must divide the 6 frames \(one of 1, 2, 3, 6\); found 4"),
        (PruneVid(segments=6), "a segment needs at least 2 frames, so `segments` is at most half of 6; found 6"),
        (PruneVid(static_ratio=1.5), r"`static_ratio` must be in 0..1; found 1.5"),
        (PruneVid(segments=2, keep=9), "`keep` = 9 cannot be reached on this clip; the nearest would be 8 or 10"),
    ],
)
def test_refusals(method: PruneVid, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)


def test_one_frame_is_refused() -> None:
    with pytest.raises(ReductionError, match="needs at least 2 frames; found 1"):
        PruneVid().fit(Site(P, 1, (3, 4), frozenset({"hidden"})))
