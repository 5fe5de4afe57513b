"""Chat-UniVi against loops written from the paper: density peaks with a fixed number of centres, three scales, events."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.chatunivi import ChatUniVi
from tests.graphs.oracle import KINDS, Array, best, features, grid

T, P, DIM = 4, 12, 6
SITE = Site(P, T, (3, 4), frozenset({"hidden"}))

Item = tuple[int, Array, float]  # anchor, token, size


def distances(tokens: list[Array]) -> Array:
    """Squared, per channel, on the documented grid: 1/4096 of the largest."""
    n = len(tokens)
    raw = np.array([[((a - b) ** 2).mean() for b in tokens] for a in tokens])
    length = max((x**2).mean() for x in tokens)
    step = max(raw.max(), 1e-6 * length) / 4096
    return np.array([[round(raw[i, j] / step) * step for j in range(n)] for i in range(n)])


def clusters(tokens: list[Array], count: int, neighbours: int, raster: bool) -> tuple[list[int], list[list[int]]]:
    """Centres, and the members of each cluster."""
    n, d = len(tokens), distances(tokens)
    density = [grid(np.exp(-np.sort(row)[:neighbours].mean())) for row in d]
    far = d.max()
    score = []
    for i in range(n):
        denser = [j for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        delta = np.sqrt(min([d[i, j] for j in denser], default=far))
        score.append(density[i] * (grid(delta / np.sqrt(far)) if far else 0))
    centres = best(score, count)
    centres = sorted(centres) if raster else centres
    parts: list[list[int]] = [[] for _ in centres]
    for i in range(n):
        near = [grid(-d[i, c], far) if far else 0 for c in centres]
        parts[centres.index(i) if i in centres else best(near, 1)[0]].append(i)
    return centres, parts


def merge(items: list[Item], count: int, neighbours: int, raster: bool) -> list[Item]:
    if len(items) == count:
        return items
    if neighbours > count:
        neighbours = min(3, max(count // 2, 1))
    centres, parts = clusters([x for _, x, _ in items], count, neighbours, raster)
    return [
        (items[c][0], np.mean([items[i][1] for i in part], 0), sum(items[i][2] for i in part))
        for c, part in zip(centres, parts, strict=True)
    ]


def expected(clip: Array, scales: tuple[int, ...], events: int, raster: bool) -> list[Item]:
    frames = [[(t * P + p, x.astype(np.float64), 1.0) for p, x in enumerate(frame)] for t, frame in enumerate(clip)]
    length, out = len(frames) // events, []
    per_scale = []
    for i, count in enumerate(scales):
        frames = [merge(frame, count, 3 if i else 5, raster) for frame in frames]
        if i:
            frames = [[(-1, x, n) for _, x, n in frame] for frame in frames]
        per_scale.append(frames)
    for e in range(events):
        for i, count in enumerate(scales):
            tokens = [item for frame in per_scale[i][e * length : (e + 1) * length] for item in frame]
            out += merge(tokens, count, 3 if i else 5, raster)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("scales", "events", "order"),
    [
        ((6, 3, 2), 1, "paper"),
        ((6, 3, 2), 2, "raster"),
        ((8, 4), 4, "paper"),
        ((5,), 2, "raster"),
        ((12, 6, 1), 2, "paper"),
    ],
)
def test_against_the_paper(kind: str, scales: tuple[int, ...], events: int, order: str) -> None:
    method = ChatUniVi(scales=scales, events=events, order=order).fit(SITE)  # type: ignore[arg-type]
    hidden = features(kind, (2, T, P, DIM))
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is not None
    for b in range(2):
        items = expected(hidden[b], scales, events, order == "raster")
        assert out.index[b].tolist() == [i for i, _, _ in items]
        assert out.size[b].tolist() == [n for _, _, n in items]
        np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([x for _, x, _ in items]), atol=1e-5)
    assert (out.size.sum(1) == len(scales) * T * P).all(), "every scale covers the clip"


def test_published_counts() -> None:
    video, image = Site(256, 64, (16, 16), frozenset({"hidden"})), Site(576, 1, (24, 24), frozenset({"hidden"}))
    fitted = ChatUniVi().fit(video)
    assert (fitted.scales, fitted.events, fitted.keep) == ((64, 32, 16), 4, 448)
    assert fitted.fit(video) == fitted
    assert ChatUniVi().fit(image).keep == 112
    assert ChatUniVi(keep=112).fit(image).scales == (64, 32, 16)
    assert ChatUniVi(keep_ratio=0.001).fit(image).scales == (1, 1, 1)
    assert fitted.position == "compact"
    assert ChatUniVi(keep_ratio=0.02).fit(video).events == 4
    more = ChatUniVi(keep_ratio=0.25).fit(video)
    assert (more.events, more.keep) == (16, 4096), "4 events hold at most 4 · 448 tokens"
    assert more.fit(video) == more


def test_one_scale_of_all_tokens_is_the_identity() -> None:
    hidden = features("random", (2, T, P, DIM))
    out = ChatUniVi(scales=(P,), events=T).fit(SITE).forward({"hidden": torch.from_numpy(hidden)})
    assert (out.tokens.numpy() == hidden.reshape(2, -1, DIM)).all()
    assert (out.index.numpy() == np.arange(T * P)).all()


def test_clear_clusters_are_found() -> None:
    """Three far-apart groups of places, the same in both frames: one token for each."""
    group = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
    hidden = (np.eye(3, dtype=np.float32) * 4)[group][None, None].repeat(2, 1)
    hidden = hidden + np.random.default_rng(0).standard_normal(hidden.shape).astype(np.float32) * 0.05
    method = ChatUniVi(scales=(3,), order="raster").fit(Site(P, 2, None, frozenset({"hidden"})))
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is not None
    np.testing.assert_allclose(out.tokens[0].numpy(), np.eye(3) * 4, atol=0.1)
    assert sorted(out.size[0].tolist()) == [6, 8, 10]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ChatUniVi(), r"`scales` must not grow, from 12 tokens per frame to 1; found 64\+32\+16"),
        (ChatUniVi(scales=(3, 4)), r"must not grow.*found 3\+4"),
        (ChatUniVi(scales=(3, 0)), r"must not grow.*found 3\+0"),
        (ChatUniVi(scales=(4, 2), keep=7), "these `scales` keep 6 tokens; leave out `keep` and `keep_ratio`"),
        (ChatUniVi(events=3, keep=9), r"`events` must divide the 4 frames \(one of 1, 2, 4\); found 3"),
        (ChatUniVi(events=2, keep=9), "`keep` = 9 cannot be reached on this clip; the nearest would be 8 or 10"),
    ],
)
def test_refusals(method: ChatUniVi, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
