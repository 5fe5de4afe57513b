"""PPT against a loop that decides for every image whether to prune or to merge."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.ppt import Ppt
from tests.graphs.oracle import KINDS, Array, attention, best, cosine, features, grid

N, DIM = 24, 8
SIGNALS = frozenset({"hidden", "size", "keys", "cls", "cls_attention", "value_norm"})
SITE = Site(N, 2, (4, 6), SIGNALS, depth=3)


def reduce(method: Ppt, block: int, signals: dict[str, Any]) -> Reduced:
    return method.reduce_frame(block, {k: torch.from_numpy(v) for k, v in signals.items()}, 1)


def prune(score: list[float], r: int) -> list[int]:
    ranked = best([grid(s, 1 / len(score)) for s in score], len(score))
    return [0] + [i + 1 for i in ranked[: len(score) - r]]


def pool(keys: Array, r: int) -> tuple[list[int], dict[int, list[int]]]:
    """The anchors in order, and who is in each odd token."""
    a, b = range(0, len(keys), 2), range(1, len(keys), 2)
    similar = {i: [grid(cosine(keys[i], keys[j])) for j in b] for i in a}
    goes = [a[i] for i in best([-(10**9) if i == 0 else max(similar[i]) for i in a], r)]
    members = {j: [j] + [i for i in goes if b[best(similar[i], 1)[0]] == j] for j in b}
    return [i for i in a if i not in goes] + list(b), members


def one_block(s: dict[str, Array], b: int, r: int, threshold: float, order: str) -> tuple[list[Any], bool]:
    hidden, size = s["hidden"][b], s["size"][b]
    score = [float(a) * float(v) for a, v in zip(s["cls_attention"][b, 1:], s["value_norm"][b, 1:], strict=True)]
    score = [x / sum(score) for x in score]
    pruning = np.var(score, ddof=1) >= threshold
    if pruning:
        out = [(i, hidden[i], float(size[i])) for i in prune(score, r)]
    else:
        anchors, members = pool(s["keys"][b], r)
        out = []
        for i in anchors:
            group = members.get(i, [i])
            total = sum(float(size[m]) for m in group)
            out.append((i, sum(hidden[m].astype(np.float64) * float(size[m]) for m in group) / total, total))
    return (sorted(out, key=lambda t: t[0]) if order == "raster" else out), bool(pruning)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["paper", "raster"])
@pytest.mark.parametrize(("keep", "threshold"), [(6, 0.0004), (13, None), (17, 0.0004), (21, 1.0)])
def test_against_the_paper_block_by_block(kind: str, order: Any, keep: int, threshold: float | None) -> None:
    method = Ppt(keep=keep, threshold=threshold, order=order).fit(SITE)
    assert method.schedule is not None and method.threshold is not None
    hidden, size = features(kind, (2, N + 1, DIM)), np.ones((2, N + 1), np.float32)
    for block in method.blocks:
        n = hidden.shape[1]
        score = attention(kind, (2, n), block)
        score[0] = score[0] * 0.02 + 0.03  # the first image has no favourites
        signals = {
            "hidden": hidden, "size": size, "keys": features(kind, (2, n, 5), block), "cls_attention": score,
            "value_norm": (np.abs(features(kind, (2, n, 1), 9))[..., 0] * 0.01 + 1).astype(np.float32),
        }  # fmt: skip
        out = reduce(method, block, signals)
        assert out.size is not None
        for b in range(2):
            expected, pruning = one_block(signals, b, method.schedule[block], method.threshold, order)
            if threshold == 0.0004 and kind == "random":
                assert pruning == (b == 1), "this test shall see both branches"
            assert out.index[b].tolist() == [i for i, _, _ in expected]
            assert out.size[b].tolist() == [s for _, _, s in expected]
            np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([t for _, t, _ in expected]), atol=1e-5)
        hidden, size = out.tokens.numpy(), out.size.numpy()
    assert hidden.shape == (2, keep + 1, DIM)


def test_knobs() -> None:
    fitted = Ppt(keep_ratio=0.5).fit(SITE)
    assert (fitted.keep, fitted.schedule, fitted.position) == (12, (0, 6, 6), "compact")
    assert fitted.fit(SITE) == fitted
    assert fitted.after(SITE) == Site(12, 2, None, frozenset({"hidden", "cls"}), 3)
    assert Ppt(keep=N).fit(SITE).blocks == ()
    paper = dataclasses.replace(SITE, tokens=196, depth=12)
    assert Ppt(keep=100).fit(paper).schedule == (0, 0, 0, 32, 0, 0, 32, 0, 0, 32, 0, 0)
    assert Ppt(keep=100).fit(paper).threshold == pytest.approx(7e-5)
    assert Ppt(keep=288).fit(dataclasses.replace(SITE, tokens=576, depth=23)).blocks == (6, 12, 18)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Ppt(), "exactly one of `keep`"),
        (Ppt(keep=5), "`keep` must be at least 6: 2 blocks, each merging at most half, bring 24 no lower; found 5"),
        (Ppt(schedule=(0, 13, 0)), r"may remove 0..12 of the 24 that reach block 1; found 13"),
        (Ppt(keep=12, threshold=0.0), "`threshold` is a variance, above 0; found 0"),
    ],
)
def test_refusals(method: Ppt, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
