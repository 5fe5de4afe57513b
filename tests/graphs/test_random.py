"""The random control: a fixed draw, nested over rates."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from graphs._contract import Site
from graphs.random import Random
from tests.graphs.oracle import features

SITE = Site(20, frames=2, grid=(4, 5), signals=frozenset({"hidden"}))


def run(method: Random, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = method.fit(SITE).forward({"hidden": torch.from_numpy(x)})
    return out.tokens.numpy(), out.index.numpy()


def test_same_for_every_frame_sample_and_call() -> None:
    x = features("random", (3, 2, 20, 4))
    tokens, index = run(Random(keep=7), x)
    again, _ = run(Random(keep=7), x)
    assert (tokens == again).all()
    assert (index == index[0]).all()
    assert (index[0, 7:] == index[0, :7] + 20).all()
    assert (np.diff(index[0]) > 0).all()
    assert (tokens == x.reshape(3, 40, 4)[:, index[0]]).all()


def test_the_draw_never_changes() -> None:
    """Bundles made at different times must agree, so the draw is spelled out here."""
    _, index = run(Random(keep=5), features("random", (1, 2, 20, 4)))
    assert index[0, :5].tolist() == [3, 5, 7, 12, 15]


def test_a_larger_keep_contains_the_smaller() -> None:
    x = features("random", (1, 2, 20, 4))
    sets = [set(run(Random(keep=k, seed=5), x)[1][0]) for k in range(1, 21)]
    assert all(a < b for a, b in itertools.pairwise(sets))
    assert sets[-1] == set(range(40))


def test_seed_matters() -> None:
    x = features("random", (1, 2, 20, 4))
    assert run(Random(keep=5, seed=1), x)[1].tolist() != run(Random(keep=5, seed=2), x)[1].tolist()
