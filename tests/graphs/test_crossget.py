"""CrossGET against a loop over pairs, written from the paper's complete-graph matching."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.crossget import CrossGet
from tests.graphs.oracle import KINDS, Array, attention, best, cosine, features, grid

N, DIM = 24, 8
SITE = Site(N, 2, (4, 6), frozenset({"hidden", "size", "keys", "cls", "cls_attention", "column_attention"}), depth=3)


def reduce(method: CrossGet, block: int, signals: dict[str, Any]) -> Reduced:
    return method.reduce_frame(block, {k: torch.from_numpy(v) for k, v in signals.items()}, 1)


def signals(kind: str, n: int, seed: int = 0) -> dict[str, Any]:
    return {
        "keys": features(kind, (2, n, 5), seed + 1),
        "cls_attention": attention(kind, (2, n), seed + 2),
        "column_attention": attention(kind, (2, n), seed + 3),
    }


def one_block(s: dict[str, Array], b: int, r: int) -> list[Any]:
    """(index, token, size) per token that is left."""
    x, size = s["hidden"][b].astype(np.float64), s["size"][b]
    patches = range(1, len(x))
    similar = {i: {j: grid(cosine(s["keys"][b, i], s["keys"][b, j])) for j in patches if j != i} for i in patches}
    importance = {i: float(s["cls_attention"][b, i]) + float(s["column_attention"][b, i]) for i in patches}
    ranked = sorted(patches, key=lambda i: (-max(similar[i].values()), i))
    score = {}
    for at, i in enumerate(ranked):
        behind = [similar[i][j] for j in ranked[at + 1 :]]
        score[i] = grid(importance[i]) - max(behind) if behind else math.inf
    sources = sorted(patches, key=lambda i: (score[i], i))[:r]
    left = [i for i in patches if i not in sources]
    joined: dict[int, list[int]] = {i: [] for i in left}
    for i in sources:
        joined[left[best([similar[i][j] for j in left], 1)[0]]].append(i)
    out = [(0, x[0], float(size[0]))]
    for d in left:
        y = x[d] * size[d]
        for i in joined[d]:
            e = np.exp([importance[i], importance[d]])
            w_s, w_d = 2 * e / e.sum()
            y = y + w_s * size[i] * x[i] + (w_d - 1) * size[d] * x[d]
        total = float(size[d]) + sum(float(size[i]) for i in joined[d])
        out.append((d, y / total, total))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [3, 13, 20, 23])
def test_against_the_paper_block_by_block(kind: str, keep: int) -> None:
    method = CrossGet(keep=keep).fit(SITE)
    assert method.schedule is not None
    hidden, size = features(kind, (2, N + 1, DIM)), np.ones((2, N + 1), np.float32)
    for block in method.blocks:
        given = signals(kind, hidden.shape[1], block) | {"hidden": hidden, "size": size}
        out = reduce(method, block, given)
        assert out.size is not None
        for b in range(2):
            expected = one_block(given, b, method.schedule[block])
            assert out.index[b].tolist() == [i for i, _, _ in expected]
            assert out.size[b].tolist() == [s for _, _, s in expected]
            np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([t for _, t, _ in expected]), atol=1e-4)
        hidden, size = out.tokens.numpy(), out.size.numpy()
    assert hidden.shape == (2, keep + 1, DIM)
    assert (size.sum(1) == N + 1).all()


def test_of_two_copies_only_the_earlier_may_look_at_the_later() -> None:
    """So one of them stays; and the more important one weighs more in the mean."""
    given = signals("random", N + 1)
    given |= {"keys": np.eye(N + 1, dtype=np.float32)[None], "hidden": features("random", (1, N + 1, DIM))}
    given |= {"size": np.ones((1, N + 1), np.float32), "cls_attention": attention("equal", (1, N + 1))}
    given["column_attention"] = np.zeros((1, N + 1), np.float32)
    given["keys"][0, 9] = given["keys"][0, 5]
    given["column_attention"][0, 9] = 0.9
    out = reduce(CrossGet(schedule=(1, 0, 0)).fit(SITE), 0, given)
    assert out.index[0].tolist() == [i for i in range(N + 1) if i != 5]
    assert out.size is not None and out.size[0, 8] == 2
    w = 1 / (1 + math.exp(0.9))
    np.testing.assert_allclose(out.tokens[0, 8], w * given["hidden"][0, 5] + (1 - w) * given["hidden"][0, 9], rtol=1e-4)


def test_merging_equal_tokens_changes_nothing() -> None:
    given = signals("random", N + 1) | {"hidden": features("equal", (2, N + 1, DIM))}
    given["size"] = np.ones((2, N + 1), np.float32)
    out = reduce(CrossGet(keep=12).fit(dataclasses.replace(SITE, depth=1)), 0, given)
    np.testing.assert_allclose(out.tokens.numpy(), given["hidden"][:, :13], rtol=1e-4, atol=1e-5)


def test_float16_accumulates_in_float32() -> None:
    given = signals("random", N + 1) | {"hidden": features("random", (2, N + 1, DIM)).astype(np.float16)}
    given["size"] = np.full((2, N + 1), 60000.0, np.float32)
    method = CrossGet(keep=12).fit(dataclasses.replace(SITE, depth=1))
    out, wide = reduce(method, 0, given), reduce(method, 0, given | {"hidden": given["hidden"].astype(np.float32)})
    assert out.tokens.dtype == torch.float16
    torch.testing.assert_close(out.tokens.float(), wide.tokens, rtol=2e-3, atol=2e-3)


def test_knobs() -> None:
    fitted = CrossGet(keep_ratio=0.5).fit(SITE)
    assert (fitted.keep, fitted.schedule, fitted.position) == (12, (4, 4, 4), "compact")
    assert fitted.fit(SITE) == fitted
    assert fitted.after(SITE) == Site(12, 2, None, frozenset({"hidden", "cls"}), 3)
    assert CrossGet(keep=N).fit(SITE).blocks == ()
    paper = dataclasses.replace(SITE, tokens=576, depth=23)
    assert CrossGet(keep=277).fit(paper).schedule == (13,) * 23


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (CrossGet(), "exactly one of `keep`"),
        (
            CrossGet(keep=2),
            "`keep` must be at least 3: 3 blocks, each merging at most half, bring 24 no lower; found 2",
        ),
        (CrossGet(schedule=(2, 12, 0)), r"may remove 0..11 of the 22 that reach block 1; found 12"),
    ],
)
def test_refusals(method: CrossGet, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
