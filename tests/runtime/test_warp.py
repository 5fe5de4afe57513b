"""From homographies to places, on a grid of 3 × 4 tokens of 10 × 10 pixels."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.errors import UsageError
from exporter.runtime.warp import at_rest, warp

GRID, IMAGE = (3, 4), (30, 40)
STILL = np.eye(3)


def shift(dx: float, dy: float) -> np.ndarray:
    return np.array([[1, 0, dx], [0, 1, dy], [0, 0, 1.0]])


def test_a_camera_at_rest() -> None:
    found = warp(np.stack([STILL] * 3), GRID, IMAGE)
    assert (found == at_rest(3, 12)).all()
    assert found.dtype == np.int64
    assert (found[0] == -1).all()
    assert found[1].tolist() == list(range(12))


def test_a_pan_to_the_right() -> None:
    """What is seen now stood one token further right before; the right edge was out of sight."""
    found = warp(np.stack([STILL, shift(10, 0)]), GRID, IMAGE)
    assert found[1].reshape(GRID).tolist() == [[1, 2, 3, -1], [5, 6, 7, -1], [9, 10, 11, -1]]


def test_zoom_about_a_corner_and_tilt() -> None:
    half = np.diag([0.5, 0.5, 1])
    assert warp(np.stack([STILL, half]), GRID, IMAGE)[1].reshape(GRID).tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [4, 4, 5, 5],
    ]
    assert (
        warp(np.stack([STILL, half * 3]), GRID, IMAGE)[1].tolist()
        == warp(np.stack([STILL, half]), GRID, IMAGE)[1].tolist()
    )


def test_behind_the_camera_is_out_of_sight() -> None:
    flipped = np.array([[1, 0, 0], [0, 1, 0], [-1 / 20, 0, 1.0]])
    found = warp(np.stack([STILL, flipped]), GRID, IMAGE)[1].reshape(GRID)
    assert (found[:, 2:] == -1).all(), "x ≥ 20 lies behind"
    assert found[0, 0] == 0


@pytest.mark.parametrize("bad", [np.eye(3), np.zeros((2, 2, 3)), np.full((2, 3, 3), np.nan)])
def test_refusals(bad: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"homographies \[frames, 3, 3\]"):
        warp(bad, GRID, IMAGE)
