"""FiCoCo-V against a loop over patches, written from the paper's three steps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs._recycle import target_count
from graphs.ficoco import FiCoCo
from tests.graphs.oracle import KINDS, Array, attention, best, features, grid

N, DIM = 26, 8
SITE = Site(N, 2, (2, 13), frozenset({"hidden", "size", "attention", "cls", "cls_attention"}), depth=4)


def reduce(method: FiCoCo, block: int, signals: dict[str, Any]) -> Reduced:
    return method.reduce_frame(block, {k: torch.from_numpy(v) for k, v in signals.items()}, 1)


def one_block(hidden: Array, maps: Array, size: Array, r: int, beta: float, quantile: float) -> list[Any]:
    """(index, token, size) per token that is left."""
    patches = list(range(1, len(hidden)))
    seen = np.array([maps[0, i] for i in patches], np.float64)
    sees = np.array([np.mean([maps[i, j] for j in patches], dtype=np.float64) for i in patches])
    exact = beta * seen / np.sqrt((seen**2).sum()) - (1 - beta) * sees / np.sqrt((sees**2).sum())
    score: list[float] = [grid(s, len(patches) ** -0.5) for s in exact]
    for start in range(0, len(score) - 3, 4):
        low = min(range(start, start + 4), key=lambda i: (score[i], i))
        score[low] = score[low] / 2 if score[low] > 0 else score[low] * 2
    goes = [patches[i] for i in sorted(range(len(score)), key=lambda i: (score[i], i))[:r]]
    stays = [i for i in patches if i not in goes]
    count = min(len(stays), max(1, math.ceil(len(hidden) * (1 - quantile) - 1e-9)))
    weights: dict[int, dict[int, float]] = {}
    for i in goes:
        targets = [stays[k] for k in best([grid(maps[i, j], 1 / len(patches)) for j in stays], count)]
        total = sum(math.exp(maps[i, j]) for j in targets)
        weights[i] = {j: round(math.exp(maps[i, j]) / total * 256) / 256 for j in targets}
        weights[i][targets[0]] += 1 - sum(weights[i].values())
    out = [(0, hidden[0].astype(np.float64), float(size[0]))]
    for j in stays:
        got = [(i, weights[i][j]) for i in goes if j in weights[i]]
        token = (hidden[j] + sum(w * hidden[i].astype(np.float64) for i, w in got)) / (1 + sum(w for _, w in got))
        out.append((j, token, size[j] + sum(w * size[i] for i, w in got)))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "knobs",
    [
        {"keep": 9},
        {"keep": 2, "quantile": 0.8},
        {"keep": 19, "beta": 1.0},
        {"schedule": (3, 0, 12, 9), "quantile": 0.5},
    ],
)
def test_against_the_paper_block_by_block(kind: str, knobs: dict[str, Any]) -> None:
    method = FiCoCo(**knobs).fit(SITE)
    assert method.schedule is not None and method.keep is not None
    hidden, size = features(kind, (2, N + 1, DIM)), np.ones((2, N + 1), np.float32)
    for block in method.blocks:
        n = hidden.shape[1]
        maps = attention(kind, (2, n, n), block)
        maps[:, 1:, 0] += attention(kind, (2, n), 3)[:, 1:]  # so that patches differ in what they give to patches
        maps /= maps.sum(-1, keepdims=True)
        given = {"hidden": hidden, "size": size, "attention": maps, "cls_attention": maps[:, 0]}
        out = reduce(method, block, given)
        assert out.size is not None
        for b in range(2):
            expected = one_block(hidden[b], maps[b], size[b], method.schedule[block], method.beta, method.quantile)
            assert out.index[b].tolist() == [i for i, _, _ in expected]
            np.testing.assert_allclose(out.size[b].numpy(), [s for _, _, s in expected], rtol=1e-5)
            np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([t for _, t, _ in expected]), atol=1e-5)
        hidden, size = out.tokens.numpy(), out.size.numpy()
    assert hidden.shape == (2, method.keep + 1, DIM)
    np.testing.assert_allclose(size.sum(1), N + 1, rtol=1e-5)
    assert (size[:, 0] == 1).all(), "nothing flows into CLS"


def test_merging_equal_tokens_changes_nothing() -> None:
    maps = attention("random", (1, N + 1, N + 1))
    hidden = features("equal", (1, N + 1, DIM))
    given = {"hidden": hidden, "size": np.ones((1, N + 1), np.float32), "attention": maps, "cls_attention": maps[:, 0]}
    out = reduce(FiCoCo(keep=5).fit(dataclasses.replace(SITE, depth=1)), 0, given)
    np.testing.assert_allclose(out.tokens.numpy(), hidden[:, :6], rtol=1e-5)


def test_what_goes_is_spread_out() -> None:
    """With all attention alike, the first of every four goes."""
    maps = attention("equal", (1, N + 1, N + 1))
    hidden = features("random", (1, N + 1, DIM))
    given = {"hidden": hidden, "size": np.ones((1, N + 1), np.float32), "attention": maps, "cls_attention": maps[:, 0]}
    out = reduce(FiCoCo(schedule=(6, 0, 0, 0)).fit(SITE), 0, given)
    assert [i for i in range(N + 1) if i not in out.index[0].tolist()] == [1, 5, 9, 13, 17, 21]


def test_knobs() -> None:
    fitted = FiCoCo(keep_ratio=0.5).fit(SITE)
    assert (fitted.keep, fitted.schedule, fitted.position) == (13, (0, 0, 7, 6), "compact")
    assert fitted.fit(SITE) == fitted
    assert fitted.after(SITE) == Site(13, 2, None, frozenset({"hidden", "cls"}), 4)
    assert fitted.merges and not fitted.proportional
    assert FiCoCo(keep=N).fit(SITE).blocks == ()
    paper = dataclasses.replace(SITE, tokens=576, depth=23)
    assert FiCoCo(keep=114).fit(paper).schedule == (0,) * 12 + (42,) * 11
    assert [target_count(q, n) for q, n in ((0.998, 577), (0.998, 500), (1.0, 577), (0.5, 9))] == [2, 1, 1, 5]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FiCoCo(), "exactly one of `keep`"),
        (FiCoCo(keep=27), "`keep` must be in 1..26"),
        (FiCoCo(keep=9, beta=1.5), "`beta` and `quantile` are in 0..1; found 1.5 and 0.998"),
        (FiCoCo(schedule=(0, 0, 20, 6)), r"may remove 0..5 of the 6 that reach block 3; found 6"),
    ],
)
def test_refusals(method: FiCoCo, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
