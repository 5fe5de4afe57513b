"""TopV against a loop written from the paper: cost, Sinkhorn's scalings one by one, recovery."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.topv import TopV, important
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

SITE = Site(12, frames=2, grid=(3, 4), signals=frozenset({"hidden", "previous"}), depth=32)
N, DIM = 24, 8


def reduce(method: TopV, previous: Array, hidden: Array) -> Reduced:
    given = {"previous": torch.from_numpy(previous), "hidden": torch.from_numpy(hidden)}
    return method.forward(method.layers[0], given)


def expected(previous: Array, hidden: Array, method: TopV) -> list[int]:
    """The kept tokens of one sample."""
    n = len(hidden)
    kernel = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            near = grid(cosine(previous[i], hidden[j])) / 4096
            (yi, xi), (yj, xj) = (divmod(t % 12, 4) for t in (i, j))
            away = math.hypot(yi - yj, xi - xj)
            cost = method.alpha * math.sqrt(max(0.0, 2 - 2 * near))
            cost += method.beta * (1 - math.exp(-(away**2) / (2 * method.sigma**2)))
            cost += method.gamma * math.hypot(yj - 1, xj - 1.5)
            kernel[i, j] = math.exp(-cost / method.epsilon)
    gives, takes = [1.0] * n, [1.0] * n
    for iteration in range(3):
        gives = [1 / sum(kernel[i, j] * takes[j] for j in range(n)) for i in range(n)]
        mass = [sum(gives[i] * kernel[i, j] * takes[j] for i in range(n)) for j in range(n)]
        if iteration < 2:
            takes = [takes[j] / mass[j] for j in range(n)]
    assert method.keep is not None and method.recovery is not None
    for chosen in range(method.keep, -1, -1):
        top = best([grid(m, 1 / 8) for m in mass], chosen)
        others = [i for i in range(n) if i not in top]
        back = others[:: method.recovery] if method.recovery else []
        if chosen + len(back) <= method.keep:
            return sorted(top + back)
    raise AssertionError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "knobs",
    [
        {"keep": 12},
        {"keep": 5, "sigma": 1.0, "gamma": 0.2},
        {"keep": 18, "alpha": 0.5, "beta": 2.0, "epsilon": 0.3, "recovery": 2, "sigma": 2.0},
        {"keep": 7, "recovery": 0, "beta": 0.0, "gamma": 0.0},
    ],
)
def test_against_the_paper(kind: str, knobs: dict[str, Any]) -> None:
    method = TopV(**knobs).fit(SITE)
    common = features("equal", (2, N, DIM), 5)
    previous = features(kind, (2, N, DIM)) + common
    hidden = previous + features("random", (2, N, DIM), 1) * (0.0 if kind == "equal" else 0.3)
    tokens, index, size = reduce(method, previous, hidden)
    assert size is None
    for b in range(2):
        assert index[b].tolist() == expected(previous[b], hidden[b], method)
        assert np.array_equal(tokens[b].numpy(), hidden[b][index[b].numpy()])


def test_what_everybody_wants_stays() -> None:
    """A target that resembles all sources takes more than one that resembles none."""
    previous = features("equal", (1, N, DIM)) + 0.3 * features("random", (1, N, DIM), 1)
    hidden = features("random", (1, N, DIM), 2)
    hidden[:, 17] = previous.mean(1)
    method = TopV(keep=1, beta=0.0, gamma=0.0).fit(SITE)
    assert method.recovery == 0
    assert reduce(method, previous, hidden).index.tolist() == [[17]]


def test_recovery_is_spread_over_what_is_dropped() -> None:
    previous = hidden = features("random", (1, N, DIM))
    without = reduce(TopV(keep=8, recovery=0).fit(SITE), previous, hidden).index[0].tolist()
    found = reduce(TopV(keep=12, recovery=4).fit(SITE), previous, hidden).index[0].tolist()
    others = [i for i in range(N) if i not in without]
    assert found == sorted(without + others[::4])


def test_all_stay_as_they_are() -> None:
    hidden = features("random", (2, N, DIM))
    tokens, index, _ = reduce(TopV(keep=N).fit(SITE), features("random", (2, N, DIM), 1), hidden)
    assert index.tolist() == [list(range(N))] * 2
    assert np.array_equal(tokens.numpy(), hidden)


def test_knobs() -> None:
    fitted = TopV().fit(SITE)
    assert (fitted.layer, fitted.keep, fitted.recovery, fitted.raster) == (2, 12, 4, (3, 4))
    assert fitted.position == "keep"
    assert fitted.fit(SITE) == fitted
    assert fitted.after(SITE) == Site(12, 1, None, SITE.signals, 32)
    assert TopV(keep=3).fit(SITE).recovery == 22, "two by importance, one of 22 others"
    lost = dataclasses.replace(SITE, grid=None)
    assert TopV(raster=(2, 6)).fit(lost).raster == (2, 6)
    for n in (7, 24):
        for every in (2, 4, 9):
            for keep in range(-(-n // every) + 1, n + 1):
                chosen = important(n, keep, every)
                assert chosen + len(range(0, n - chosen, every)) == keep, "every count can be reached"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (TopV(layer=32), r"`layer` must be in 1..31"),
        (TopV(keep=25), r"`keep` must be in 1..24"),
        (
            TopV(keep=6, recovery=4),
            r"`recovery` must be 0, or so large that .* 24 tokens are fewer than `keep` = 6; found 4",
        ),
        (TopV(recovery=-1), r"`recovery` must be 0"),
        (TopV(sigma=0.0), r"`sigma` and `epsilon` above; found 1, 1, 0.01, 0 and 0.1"),
        (TopV(raster=(4, 4)), r"`raster` must be rows and columns of the 12 tokens of a frame; found 4\+4"),
    ],
)
def test_refusals(method: TopV, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)


def test_a_lost_raster_is_refused() -> None:
    with pytest.raises(ReductionError, match="needs the raster of the tokens"):
        TopV().fit(dataclasses.replace(SITE, grid=None))
