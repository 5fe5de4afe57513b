"""TESTA against loops over frames, patches and votes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.testa import TESTA
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

T, N, DIM = 7, 12, 8
SITE = Site(N, T, (3, 4), frozenset({"hidden", "size", "keys", "cls"}), depth=3)

Token = tuple[int, Any, Any, float]  # index, token, key, size


def run(method: TESTA, block: int, hidden: Any, keys: Any, size: Array, cls: int) -> tuple[Array, Array, Array]:
    given = {"hidden": hidden, "keys": keys, "size": size}
    out = method.forward(block, {k: torch.from_numpy(v) for k, v in given.items()}, cls)
    assert out.size is not None
    return out.tokens.numpy(), out.index.numpy(), out.size.numpy()


def mean(tokens: list[Token]) -> Token:
    """The first one is the anchor."""
    total = sum(t[3] for t in tokens)
    token = sum(t[1].astype(np.float64) * t[3] for t in tokens) / total
    key = sum(t[2].astype(np.float64) * t[3] for t in tokens) / total
    return tokens[0][0], token, key, total


def groups(count: int, score: dict[int, int], partner: dict[int, int], r: int, order: str) -> list[list[int]]:
    """Places by what merges: what stays of the even ones, then the odd ones with those that joined; anchors first."""
    goes = sorted(score, key=lambda i: (-score[i], i))[:r]
    out = [[i] for i in range(0, count, 2) if i not in goes]
    out += [[j] + [i for i in goes if partner[i] == j] for j in range(1, count, 2)]
    return sorted(out) if order == "raster" else out


def one_sample(clip: list[list[Token]], f: int, r: int, cls: int, order: str) -> list[list[Token]]:
    odd = list(range(1, len(clip), 2))
    if f:
        score, partner = {}, {}
        for a in range(0, len(clip), 2):
            votes, top = Counter[int](), []
            for p in range(cls, len(clip[a])):
                exact = [cosine(clip[a][p][2], clip[b][p][2]) for b in odd]
                votes[odd[best([grid(x) for x in exact], 1)[0]]] += 1
                top.append(max(exact))
            score[a] = grid(sum(top) / len(top))
            partner[a] = min(odd, key=lambda b: (-votes[b], b))
        together = groups(len(clip), score, partner, f, order)
        clip = [[mean([clip[i][p] for i in group]) for p in range(len(clip[0]))] for group in together]
    if r:
        out = []
        for frame in clip:
            odd = list(range(1, len(frame), 2))
            score, partner = {}, {}
            for a in range(0, len(frame), 2):
                scores = [grid(cosine(frame[a][2], frame[b][2])) for b in odd]
                score[a] = -(10**9) if cls and a == 0 else max(scores)
                partner[a] = odd[best(scores, 1)[0]]
            out.append([mean([frame[i] for i in g]) for g in groups(len(frame), score, partner, r, order)])
        clip = out
    return clip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize("order", ["paper", "raster"])
@pytest.mark.parametrize(
    "knobs",
    [
        {"keep": 5},
        {"keep": 12, "keep_frames": 1},
        {"frame_schedule": (0, 2, 1), "patch_schedule": (3, 2, 0)},
        {"keep": 2, "keep_frames": 7},
    ],
)
def test_against_the_paper_block_by_block(kind: str, cls: int, order: Any, knobs: dict[str, Any]) -> None:
    method = TESTA(order=order, **knobs).fit(SITE)
    assert method.frame_schedule is not None and method.patch_schedule is not None
    hidden, size = features(kind, (2, T, N + cls, DIM)), np.ones((2, T, N + cls), np.float32)
    for block in method.blocks:
        keys = features(kind, (*hidden.shape[:3], 5), block + 1)
        tokens, index, sizes = run(method, block, hidden, keys, size, cls)
        for b in range(2):
            n = hidden.shape[2]
            clip = [
                [(t * n + p, hidden[b, t, p], keys[b, t, p], float(size[b, t, p])) for p in range(n)]
                for t in range(hidden.shape[1])
            ]
            expected = one_sample(clip, method.frame_schedule[block], method.patch_schedule[block], cls, order)
            assert index[b].tolist() == [[t[0] for t in frame] for frame in expected]
            assert sizes[b].tolist() == [[t[3] for t in frame] for frame in expected]
            np.testing.assert_allclose(tokens[b], [[t[1] for t in frame] for frame in expected], atol=1e-5)
        hidden, size = tokens, sizes
    assert hidden.shape == (2, method.keep_frames, method.keep + cls, DIM)  # type: ignore[operator]
    assert (size.sum((1, 2)) == T * (N + cls)).all()


def test_the_majority_of_patches_decides() -> None:
    """Most patches of frame 2 look like frame 3, the others are copies of frame 1: 2 joins 3, with all its patches."""
    hidden = features("random", (1, 4, N, DIM))
    hidden[0, 2, :5] = hidden[0, 1, :5]
    hidden[0, 2, 5:] = hidden[0, 3, 5:]
    method = TESTA(frame_schedule=(1, 0, 0), patch_schedule=(0, 0, 0)).fit(dataclasses.replace(SITE, frames=4))
    tokens, index, size = run(method, 0, hidden, hidden, np.ones((1, 4, N), np.float32), 0)
    assert (index[0, :, 0] == [0, N, 3 * N]).all()
    assert (size[0, :, 0] == [1, 1, 2]).all()
    np.testing.assert_allclose(tokens[0, 2], (hidden[0, 2] + hidden[0, 3]) / 2, rtol=1e-5, atol=1e-6)


def test_a_frozen_clip_becomes_one_of_its_frames() -> None:
    hidden = features("frozen", (1, T, N, DIM))
    tokens, index, size = run(
        TESTA(frame_schedule=(3, 0, 0), patch_schedule=(0, 0, 0)).fit(SITE),
        0,
        hidden,
        hidden,
        np.ones((1, T, N), np.float32),
        0,
    )
    np.testing.assert_allclose(tokens, hidden[:, :4], rtol=1e-5, atol=1e-6)
    assert (index[0, :, 0] // N).tolist() == [6, 1, 3, 5], "even frames join the first odd one"
    assert size[0, :, 0].tolist() == [1, 4, 1, 1]


def test_float16_accumulates_in_float32() -> None:
    hidden = features("random", (1, T, N, DIM)).astype(np.float16)
    size = np.full((1, T, N), 60000.0, np.float32)
    method = TESTA(keep=6, keep_frames=4).fit(dataclasses.replace(SITE, depth=1))
    out, wide = run(method, 0, hidden, hidden, size, 0), run(method, 0, hidden.astype(np.float32), hidden, size, 0)
    assert out[0].dtype == np.float16
    np.testing.assert_allclose(out[0].astype(np.float32), wide[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("knobs", "frames", "keep"),
    [
        ({"keep": 5}, 4, 5),
        ({"keep_ratio": 0.25}, 4, 5),
        ({"keep_ratio": 0.75}, 6, 11),
        ({"keep_ratio": 1.0}, 7, 12),
        ({"keep_ratio": 0.25, "keep_frames": 7}, 7, 3),
        ({"keep": 12, "keep_frames": 7}, 7, 12),
        ({"patch_schedule": (1, 2, 3), "keep_frames": 5}, 5, 6),
    ],
)
def test_counts(knobs: dict[str, Any], frames: int, keep: int) -> None:
    fitted = TESTA(**knobs).fit(SITE)
    assert (fitted.keep_frames, fitted.keep, fitted.position) == (frames, keep, "compact")
    assert fitted.after(SITE) == Site(keep, frames, None, frozenset({"hidden", "cls"}), 3)
    assert fitted.fit(SITE) == fitted
    if (frames, keep) == (T, N):
        assert fitted.blocks == ()


def test_schedules() -> None:
    video = dataclasses.replace(SITE, tokens=196, frames=96, depth=12)
    paper = TESTA(keep=100, keep_frames=48).fit(video)
    assert (paper.frame_schedule, paper.patch_schedule) == ((4,) * 12, (8,) * 12)
    assert TESTA(keep=2, keep_frames=6).fit(SITE).frame_schedule == (0, 1, 0)
    assert TESTA(keep=2).fit(dataclasses.replace(SITE, frames=1)).keep_frames == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (TESTA(), "exactly one of `keep`"),
        (TESTA(keep=1), "`keep` must be at least 2: 3 blocks, each merging at most half, bring 12 no lower; found 1"),
        (TESTA(keep=5, keep_frames=8), "`keep_frames` must be in 1..7, as there are 7 frames; found 8"),
        (TESTA(keep_ratio=0.5, keep_frames=2), "is more than all of 2; give a larger `keep_frames`"),
        (TESTA(keep_ratio=1.5), "`keep_ratio` is the fraction that stays"),
        (
            TESTA(keep=5, frame_schedule=(4, 0, 0)),
            r"`frame_schedule` may remove 0..3 of the 7 that reach block 0; found 4",
        ),
        (TESTA(keep=5, frame_schedule=(1, 0, 0), keep_frames=5), "keeps 6 of 7 frames; leave out `keep_frames` = 5"),
        (TESTA(keep=5, patch_schedule=(1, 0, 0)), "keeps 11 of 12 tokens; leave out `keep` = 5"),
        (TESTA(patch_schedule=(1, 0)), "one number for each of the tower's 3 blocks; found 2"),
    ],
)
def test_refusals(method: TESTA, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
