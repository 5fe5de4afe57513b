"""The uniform control: even over the grid, whatever the rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.uniform import Uniform, grid
from tests.graphs.oracle import features


@pytest.mark.parametrize("shape", [(4, 6), (1, 24), (24, 24), (7, 3), (1, 1)])
def test_every_rate_gives_distinct_ascending_places(shape: tuple[int, int]) -> None:
    n = shape[0] * shape[1]
    for keep in range(1, n + 1):
        index = grid(*shape, keep)
        assert len(index) == keep
        assert index == sorted(set(index))
        assert index[0] >= 0
        assert index[-1] < n
    assert grid(*shape, n) == list(range(n))


def test_square_rates_are_a_lattice() -> None:
    rows = [1, 4, 7, 10, 13, 16, 19, 22]
    assert grid(24, 24, 64) == [24 * r + c for r in rows for c in rows]


@pytest.mark.parametrize("keep", [16, 24, 48, 100, 144])
def test_no_region_is_left_out(keep: int) -> None:
    """Every token has a kept one near: at most about one spacing away, in rows and in columns."""
    kept = np.array([divmod(i, 24) for i in grid(24, 24, keep)])
    every = np.array([divmod(i, 24) for i in range(576)])
    distance = np.abs(every[:, None] - kept[None]).max(-1).min(-1).max()
    assert distance <= np.ceil(24 / np.sqrt(keep))


def test_raster_is_the_plain_stride() -> None:
    site = Site(24, grid=(4, 6), signals=frozenset({"hidden"}))
    x = features("random", (2, 1, 24, 4))
    out = Uniform(keep=7, rows=1).fit(site).forward({"hidden": torch.from_numpy(x)})
    expected = [int((i + 0.5) * 24 / 7) for i in range(7)]
    assert out.index.tolist() == [expected, expected]
    assert (out.tokens.numpy() == x[:, 0, expected]).all()


def test_rows_come_from_the_site() -> None:
    assert Uniform(keep=4).fit(Site(24, grid=(4, 6), signals=frozenset({"hidden"}))).rows == 4
    assert Uniform(keep=4).fit(Site(24, signals=frozenset({"hidden"}))).rows == 1
    with pytest.raises(ReductionError, match=r"`rows` must divide the 24 tokens of a frame; found 5"):
        Uniform(keep=4, rows=5).fit(Site(24, signals=frozenset({"hidden"})))
