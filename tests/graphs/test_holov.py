"""HoloV against a loop written from the official description, variance of cosines included."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from graphs._contract import ReductionError, Site
from graphs.holov import HoloV
from tests.graphs.oracle import KINDS, Array, attention, best, features, grid, run

N, FRAMES, DIM = 29, 2, 8
CLS = Site(N, FRAMES, None, frozenset({"hidden", "cls_attention", "column_attention"}))
NO_CLS = Site(N, FRAMES, None, frozenset({"hidden", "column_attention"}))


def signals(kind: str, batch: int = 2) -> dict[str, Array]:
    return {
        "hidden": features(kind, (batch, FRAMES, N, DIM)),
        "cls_attention": attention(kind, (batch, FRAMES, N)),
        "column_attention": attention(kind, (batch, FRAMES, N), 7),
    }


def crop_score(x: Array, attention: Array) -> float:
    """The published formula, to the letter."""
    size = len(x)
    unit = x.astype(np.float64) / (np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) + 1e-6)
    cos = (unit @ unit.T) * (1 - np.eye(size))
    mean = cos.sum(1) / (size - 1)
    variance = ((cos - mean[:, None]) ** 2).sum(1) / (size - 1)
    scaled = attention.astype(np.float64) * 1e3
    return float((scaled + 0.09 * variance * np.abs(scaled).mean() / (np.abs(variance).mean() + 1e-6)).mean())


def one_frame(x: Array, attention: Array, keep: int, crops: int) -> list[int]:
    size, longer = N // crops, N % crops
    places, start = [], 0
    for g in range(crops):
        places.append(list(range(start, start + size + (g < longer))))
        start = places[-1][-1] + 1
    weights = np.array([crop_score(x[p], attention[p]) for p in places])
    weight = [grid(w / weights.sum()) for w in weights]
    exact = [w * keep / sum(weight) for w in weight]
    quota = [int(np.floor(round(e * 4096) / 4096)) for e in exact]
    for g in best(weight, keep - sum(quota)):
        quota[g] += 1
    assert sum(quota) == keep
    score = [grid(a, 1 / N) for a in attention]
    ranked = [[p[i] for i in best([score[j] for j in p], len(p))] for p in places]
    taken = [set(r[:q]) for r, q in zip(ranked, quota, strict=True)]
    for i in best(score, N):
        if sum(map(len, taken)) < keep and not any(i in t for t in taken):
            taken[next(g for g, p in enumerate(places) if i in p)].add(i)
    out = []
    for p, r, q, t in zip(places, ranked, quota, taken, strict=True):
        out += [i for i in (p if q >= len(p) else r) if i in t]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keep", "crops"), [(9, 5), (7, None), (20, 4), (28, 7), (3, 14), (12, 1), (29, 6)])
@pytest.mark.parametrize("order", ["paper", "raster"])
@pytest.mark.parametrize("cls", [True, False])
def test_against_the_official_description(kind: str, keep: int, crops: int | None, order: str, cls: bool) -> None:
    method = HoloV(keep=keep, num_patches=crops, order=order).fit(CLS if cls else NO_CLS)  # type: ignore[arg-type]
    assert method.num_patches is not None
    given = signals(kind)
    tokens, index = run(method, given)
    for b in range(2):
        for f in range(FRAMES):
            hidden, score = given["hidden"][b, f], given["cls_attention" if cls else "column_attention"][b, f]
            expected = one_frame(hidden, score, keep, method.num_patches)
            expected = sorted(expected) if order == "raster" else expected
            part = slice(f * keep, (f + 1) * keep)
            assert (index[b, part] - f * N).tolist() == expected
            assert (tokens[b, part] == hidden[expected]).all()


def test_a_crop_that_runs_out_of_tokens_passes_its_quota_on() -> None:
    given = signals("equal", 1)
    given["cls_attention"][..., :5] *= 20
    given["cls_attention"][..., 20] *= 2
    given["cls_attention"] /= given["cls_attention"].sum(-1, keepdims=True)
    _, index = run(HoloV(keep=9, num_patches=5).fit(CLS), given)
    assert index[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 20], "quotas are 8 of 6 tokens, 1 in the fourth crop"


def test_default_crops() -> None:
    site = dataclasses.replace(CLS, tokens=576)
    crops = {k: HoloV(keep=k).fit(site).num_patches for k in (64, 128, 192, 576, 1)}
    assert crops == {64: 16, 128: 8, 192: 5, 576: 1, 1: 288}


def test_one_crop_is_top_k() -> None:
    given = signals("random")
    _, index = run(HoloV(keep=5, num_patches=1).fit(CLS), given)
    top = np.argsort(-given["cls_attention"], -1)[..., :5]
    assert (index == (top + np.arange(FRAMES)[:, None] * N).reshape(2, -1)).all()


def test_keeping_all_is_the_identity() -> None:
    given = signals("random")
    tokens, index = run(HoloV(keep_ratio=1).fit(CLS), given)
    assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()


def test_auto_follows_the_site() -> None:
    with_cls, without = HoloV(keep=8).fit(CLS), HoloV(keep=8).fit(NO_CLS)
    assert (with_cls.score, with_cls.position) == ("cls", "compact")
    assert (without.score, without.needs) == ("column", ("hidden", "column_attention"))
    assert HoloV(keep=8).fit(dataclasses.replace(NO_CLS, grid_positions=True)).position == "keep"
    assert with_cls.fit(CLS) == with_cls


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (HoloV(keep=30), CLS, r"`keep` must be in 1..29"),
        (HoloV(), CLS, "exactly one of `keep`"),
        (HoloV(keep=4, num_patches=15), CLS, r"`num_patches` must be in 1..14, .* found 15"),
        (HoloV(keep=4, score="cls"), NO_CLS, "needs `cls_attention`"),
    ],
)
def test_refusals(method: HoloV, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
