"""VisionZip against a loop written from the paper."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from graphs._contract import ReductionError, Site
from graphs.visionzip import VisionZip
from tests.graphs.oracle import KINDS, Array, attention, best, cosine, features, grid, run_merging

N, FRAMES, DIM = 24, 3, 8
CLS = Site(N, FRAMES, (4, 6), frozenset({"hidden", "cls", "keys", "cls_attention", "column_attention"}))
NO_CLS = Site(N, FRAMES, (4, 6), frozenset({"hidden", "keys", "column_attention"}))


def signals(kind: str, batch: int = 2) -> dict[str, Array]:
    return {
        "hidden": features(kind, (batch, FRAMES, N, DIM)),
        "keys": features(kind, (batch, FRAMES, N, 5), 1),
        "cls": features("random", (batch, FRAMES, DIM), 2),
        "cls_attention": attention(kind, (batch, FRAMES, N)),
        "column_attention": attention(kind, (batch, FRAMES, N), 7),
    }


def one_frame(hidden: Array, keys: Array, score: Array, cls: Array | None, dominant: int, contextual: int) -> list[Any]:
    """(index, token, size) per kept token. `dominant` counts CLS, as in the paper."""
    n = len(hidden)
    chosen = sorted(best([grid(s, 1 / n) for s in score], dominant - (cls is not None)))
    out: list[Any] = [] if cls is None else [(-1, cls, 1)]
    out += [(i, hidden[i], 1) for i in chosen]
    rest = [i for i in range(n) if i not in chosen]
    if contextual:
        step = max(1, len(rest) // contextual)
        targets = rest[::step][:contextual]
        joined: dict[int, list[int]] = {t: [] for t in targets}
        for i in rest:
            if i not in targets:
                similar = [grid(cosine(keys[i], keys[t])) for t in targets]
                joined[targets[best(similar, 1)[0]]].append(i)
        for t, members in joined.items():
            mean = np.mean([hidden[m] for m in members], 0) if members else 0
            out.append((t, hidden[t] + mean, 1 + len(members)))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keep", "contextual"), [(9, 4), (12, None), (5, 0), (24, 10), (20, 9), (3, 2)])
@pytest.mark.parametrize("site", [CLS, NO_CLS], ids=["cls", "no-cls"])
@pytest.mark.parametrize("order", ["paper", "raster"])
def test_against_the_paper(kind: str, keep: int, contextual: int | None, site: Site, order: str) -> None:
    method = VisionZip(keep=keep, contextual=contextual, order=order).fit(site)  # type: ignore[arg-type]
    assert method.contextual is not None
    given = signals(kind)
    tokens, index, size = run_merging(method, given)
    for b in range(2):
        expected = []
        for f in range(FRAMES):
            score = given["cls_attention" if site is CLS else "column_attention"][b, f]
            cls = given["cls"][b, f] if site is CLS else None
            part = one_frame(
                given["hidden"][b, f], given["keys"][b, f], score, cls, keep - method.contextual, method.contextual
            )
            part = sorted(part, key=lambda t: t[0]) if order == "raster" else part
            expected += [(i if i < 0 else i + f * N, token, s) for i, token, s in part]
        assert index[b].tolist() == [i for i, _, _ in expected]
        assert size[b].tolist() == [s for _, _, s in expected]
        np.testing.assert_allclose(tokens[b], np.stack([t for _, t, _ in expected]), atol=1e-5)
        if method.contextual:
            assert size[b].sum() == FRAMES * (N + (site is CLS))


def test_paper_splits() -> None:
    site = dataclasses.replace(CLS, tokens=576, grid=(24, 24))
    splits = {k: VisionZip(keep=k).fit(site).contextual for k in (64, 128, 192, 1, 3, 4, 577)}
    assert splits == {64: 10, 128: 20, 192: 30, 1: 0, 3: 0, 4: 1, 577: 90}


def test_keeping_all_is_the_identity() -> None:
    given = signals("random")
    tokens, index, size = run_merging(VisionZip(keep=N, order="raster").fit(NO_CLS), given)
    assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()
    assert (size == 1).all()


def test_merging_equal_tokens_doubles_them() -> None:
    """The paper's contextual token is a sum of target and mean, by design."""
    given = signals("equal")
    tokens, _, size = run_merging(VisionZip(keep=6, contextual=2).fit(NO_CLS), given)
    token = given["hidden"][0, 0, 0]
    np.testing.assert_allclose(tokens[0, :4], np.tile(token, (4, 1)))
    np.testing.assert_allclose(tokens[0, 4], 2 * token, rtol=1e-6)
    assert (tokens[0, 5] == token).all(), "nobody joined the second target: it stays as it is"
    assert size[0, :6].tolist() == [1, 1, 1, 1, 19, 1]


def test_batches_do_not_mix() -> None:
    method, given = VisionZip(keep=9).fit(CLS), signals("random")
    both = run_merging(method, given)
    for b in range(2):
        alone = run_merging(method, {k: v[b : b + 1] for k, v in given.items()})
        assert all((x[b] == y[0]).all() for x, y in zip(both, alone, strict=True))


def test_float16_accumulates_in_float32() -> None:
    given = {k: v.astype(np.float16) for k, v in signals("random").items()}
    method = VisionZip(keep=6, contextual=3).fit(NO_CLS)
    tokens, _, _ = run_merging(method, given)
    wide, _, _ = run_merging(method, {k: v.astype(np.float32) for k, v in given.items()})
    assert tokens.dtype == np.float16
    np.testing.assert_allclose(tokens.astype(np.float32), wide, rtol=1e-3, atol=1e-3)


def test_auto_follows_the_site() -> None:
    with_cls, without = VisionZip(keep=8).fit(CLS), VisionZip(keep=8).fit(NO_CLS)
    assert (with_cls.score, with_cls.cls, with_cls.position) == ("cls", "on", "compact")
    assert (without.score, without.cls, without.position) == ("column", "off", "compact")
    assert VisionZip(keep=8).fit(dataclasses.replace(CLS, grid_positions=True)).position == "keep"
    assert VisionZip(keep=25).fit(CLS).keep == 25
    assert with_cls.fit(CLS) == with_cls


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (VisionZip(keep=25), NO_CLS, "`keep` must be in 1..24"),
        (VisionZip(keep=4, contextual=4), CLS, r"`contextual` .* must be in 0..3; found 4"),
        (VisionZip(keep=4, score="cls"), NO_CLS, "needs `cls_attention`, `cls`, but this model offers only"),
        (VisionZip(keep=4, score="topic"), CLS, "`score` takes auto, cls or column; found 'topic'"),  # type: ignore[arg-type]
        (VisionZip(keep=4.0), CLS, "`keep` takes a whole number or none; found 4.0"),  # type: ignore[arg-type]
        (VisionZip(), CLS, "exactly one of `keep`"),
        (VisionZip(keep_ratio=1.5), CLS, r"`keep_ratio` is the fraction that stays"),
    ],
)
def test_refusals(method: VisionZip, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
