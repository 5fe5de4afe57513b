"""LFTR against loops written from its formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphs._contract import ReductionError, Site
from graphs.lftr import Lftr
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid, run_merging

T, P, DIM, TEXT = 5, 12, 6, 7
SITE = Site(P, T, (3, 4), frozenset({"hidden", "cls", "text", "text_mask"}))


def signals(kind: str, batch: int = 2) -> dict[str, Array]:
    mask = np.ones((batch, TEXT), np.float32)
    mask[0, 4:] = 0
    return {
        "hidden": features(kind, (batch, T, P, DIM)),
        "cls": features(kind, (batch, T, 1, DIM), 2)[:, :, 0],
        "text": features("random", (batch, TEXT, DIM), 3),
        "text_mask": mask,
    }


def runs(sequence: Array, measure: str, slots: int, scale: float) -> list[list[int]]:
    """The frames of one place, cut into `slots` runs."""
    change = []
    for i in range(1, len(sequence)):
        if measure == "similarity":
            change.append(grid(-cosine(sequence[i], sequence[i - 1])))
        else:
            change.append(grid(np.abs(sequence[i] - sequence[i - 1]).mean(dtype=np.float64), scale))
    heads = [0] + [i + 1 for i in best(change, slots - 1)]
    out: list[list[int]] = []
    for i in range(len(sequence)):
        if i in heads:
            out.append([])
        out[-1].append(i)
    return out


def one_sample(m: Lftr, given: dict[str, Array], b: int) -> list[Any]:
    """(index, token, size) per kept token, from the definition."""
    z = given["hidden"][b]
    if "cls" in m.needs:
        z = np.concatenate([given["cls"][b][:, None], z], 1)
    offset = z.shape[1] - P
    assert m.keep_frames is not None
    assert m.keep is not None
    scale = float(np.abs(z).mean(dtype=np.float64)) + 1e-12
    merged = []  # [place][slot] = (head, token, size)
    for p in range(z.shape[1]):
        parts = runs(z[:, p], m.temporal, m.keep_frames, scale) if m.temporal else [[i] for i in range(T)]
        merged.append([(part[0], z[part, p].mean(0), len(part)) for part in parts])
    slots = [[merged[p][j] for p in range(z.shape[1])] for j in range(m.keep_frames)]
    mask = given["text_mask"][b].astype(bool)
    text = given["text"][b][mask].astype(np.float64)
    first = 0 if m.cls else offset
    every = np.stack([token for slot in slots for _, token, _ in slot[first:]])
    unit = np.sqrt((every.astype(np.float64) ** 2).sum(-1).mean() * (text.mean(0) ** 2).sum()) + 1e-12
    out = []
    for slot in slots:
        if m.spatial == "topic":
            score = [grid(cosine(token, slot[0][1])) for _, token, _ in slot[first:]]
        elif m.spatial == "text":
            score = [grid(np.mean([token @ e for e in text]), unit) for _, token, _ in slot[first:]]
        else:
            score = [0] * (len(slot) - first)
        for place in sorted(i + first for i in best(score, m.keep)):
            head, token, size = slot[place]
            out.append((head * P + place - offset if place >= offset else -1, token, size))
    return out


MODES = [
    (temporal, keep_frames, spatial)
    for temporal, keep_frames in ((None, 5), *((t, k) for t in ("differential", "similarity") for k in (1, 3, 5)))
    for spatial in (None, "topic", "text")
    if temporal or spatial
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temporal", "keep_frames", "spatial"), MODES)
@pytest.mark.parametrize("cls", [False, True])
def test_against_the_formulas(kind: str, temporal: Any, keep_frames: int, spatial: Any, cls: bool) -> None:
    method = Lftr(temporal, keep_frames, spatial, keep=5 if spatial else None, cls=cls).fit(SITE)
    given = signals(kind)
    tokens, index, size = run_merging(method, given)
    after = method.after(SITE)
    assert index.shape == (2, after.total)
    for b in range(2):
        expected = one_sample(method, given, b)
        assert index[b].tolist() == [i for i, _, _ in expected]
        assert size[b].tolist() == [s for _, _, s in expected]
        np.testing.assert_allclose(tokens[b], np.stack([t for _, t, _ in expected]), atol=1e-5)
    if spatial is None:
        assert (size.sum(1) == T * (P + cls)).all()
    if spatial == "topic" and cls:
        assert ((index == -1).sum(1) == keep_frames).all(), "CLS survives in every slot"


@pytest.mark.parametrize("temporal", ["differential", "similarity"])
def test_of_two_equal_frames_the_second_goes(temporal: Any) -> None:
    given = signals("random")
    given["hidden"][:, 3] = given["hidden"][:, 2]
    _, index, size = run_merging(Lftr(temporal, 4).fit(SITE), given)
    assert (index == np.r_[0 : 3 * P, 4 * P : 5 * P]).all()
    assert (size == np.repeat([1, 1, 2, 1], P)).all()


@pytest.mark.parametrize("temporal", ["differential", "similarity"])
@pytest.mark.parametrize("noise", [0, 1e-6])
def test_a_frozen_clip_keeps_its_first_frames(temporal: Any, noise: float) -> None:
    """Rounding noise must not decide: it is below the score grid."""
    given = signals("frozen")
    wobble = np.random.default_rng(9).standard_normal(given["hidden"].shape) * noise
    given["hidden"] = (given["hidden"] + wobble).astype(np.float32)
    _, index, size = run_merging(Lftr(temporal, 3).fit(SITE), given)
    assert (index == np.arange(3 * P)).all()
    assert (size == np.repeat([1, 1, 3], P)).all()


def test_scale_of_the_features_does_not_matter() -> None:
    given = signals("random")
    method = Lftr("differential", 3, "text", keep=4).fit(SITE)
    large = given | {"hidden": given["hidden"] * 1024, "text": given["text"] / 4096}
    assert (run_merging(method, given)[1] == run_merging(method, large)[1]).all()


def test_padding_text_changes_nothing() -> None:
    given = signals("random")
    method = Lftr(spatial="text", keep=4).fit(SITE)
    other = given | {"text": np.where(given["text_mask"][..., None] > 0, given["text"], 1e4).astype(np.float32)}
    assert (run_merging(method, given)[0] == run_merging(method, other)[0]).all()
    longer = given | {
        "text": np.concatenate([given["text"], given["text"]], 1),
        "text_mask": np.concatenate([given["text_mask"], 0 * given["text_mask"]], 1),
    }
    assert (run_merging(method, given)[0] == run_merging(method, longer)[0]).all()


def test_keeping_all_is_the_identity() -> None:
    given = signals("random")
    for method in (Lftr("similarity", T), Lftr(spatial="topic", keep=P), Lftr("differential", T, "text", keep=P)):
        tokens, index, size = run_merging(method.fit(SITE), given)
        assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
        assert (index == np.arange(T * P)).all()
        assert (size == 1).all()


def test_batches_do_not_mix() -> None:
    given = signals("random")
    method = Lftr("differential", 3, "text", keep=4, cls=True).fit(SITE)
    both = run_merging(method, given)
    for b in range(2):
        alone = run_merging(method, {k: v[b : b + 1] for k, v in given.items()})
        assert (both[1][b] == alone[1][0]).all()
        np.testing.assert_allclose(both[0][b], alone[0][0], atol=1e-6)


def test_float16_accumulates_in_float32() -> None:
    given = {k: v.astype(np.float16) for k, v in signals("random").items()}
    method = Lftr("similarity", 2, "topic", keep=4).fit(SITE)
    tokens, index, _ = run_merging(method, given)
    wide = run_merging(method, {k: v.astype(np.float32) for k, v in given.items()})
    assert tokens.dtype == np.float16
    assert (index == wide[1]).all()
    np.testing.assert_allclose(tokens.astype(np.float32), wide[0], rtol=1e-3, atol=1e-3)


def test_text_works_behind_the_projector() -> None:
    assert Lftr(spatial="text", keep=4).space == "llm"
    assert Lftr(spatial="topic", keep=4).space == "tower"
    assert Lftr("similarity", 2).space == "tower"


def test_what_is_left_behind_it() -> None:
    assert Lftr("similarity", 2).fit(SITE).after(SITE) == Site(P, 2, (3, 4), frozenset({"hidden", "text", "text_mask"}))
    assert Lftr(spatial="topic", keep=4).fit(SITE).after(SITE) == Site(4, T, None, SITE.signals)
    assert Lftr("similarity", 2, cls=True).fit(SITE).after(SITE).tokens == P + 1


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (Lftr(), SITE, "found neither"),
        (Lftr("similarity", 2), Site(P, 1, None, SITE.signals), "a clip, so it needs at least 2; found 1"),
        (Lftr("similarity"), SITE, r"needs `keep_frames` in 1..5, as there are 5 frames; found none"),
        (Lftr("similarity", 6), SITE, "found 6"),
        (Lftr(keep_frames=3, spatial="topic", keep=3), SITE, "`keep_frames` = 3 needs `temporal`"),
        (Lftr("similarity", 3, keep=4), SITE, "`keep` = 4 needs `spatial`"),
        (Lftr("similarity", 3, keep_ratio=0.5), SITE, "`keep_ratio` = 0.5 needs `spatial`"),
        (Lftr(spatial="topic"), SITE, "exactly one of"),
        (Lftr(spatial="topic", keep=13), SITE, r"1..12, as there are 12 tokens per frame; found 13"),
        (Lftr(spatial="topic", keep=3), Site(P, T, None, frozenset({"hidden"})), "needs `cls`"),
        (Lftr("both", 3), SITE, "`temporal` takes differential, similarity or none; found 'both'"),  # type: ignore[arg-type]
    ],
)
def test_refusals(method: Lftr, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
