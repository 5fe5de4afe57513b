"""Camera motion as an input of the reduction: homographies to the `warp` signal. Pure numpy.

Estimating a homography is a job for a vision library (OpenCV's `findHomography`) or for the device's odometry.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.errors import UsageError

Ints = npt.NDArray[np.int64]


def warp(homographies: npt.NDArray[np.floating[Any]], grid: tuple[int, int], image: tuple[int, int]) -> Ints:
    """Where every token was in the frame before.

    Args:
        homographies: [frames, 3, 3], each maps a pixel (x, y, 1) of its frame, as the model sees it, to the frame before.
            The first frame has none before; its entry does not matter.
        grid: rows and columns of a frame's tokens. image: height and width of the model's input, in pixels.
    Returns:
        int64 [frames, rows * columns]: the token of the frame before that the centre of each token falls on, -1 if it was
        out of sight or behind the camera; -1 throughout the first frame.
    Raises:
        UsageError: no stack of finite 3 × 3 matrices.
    """
    matrices = np.asarray(homographies, np.float64)
    if matrices.ndim != 3 or matrices.shape[1:] != (3, 3) or not np.isfinite(matrices).all():
        raise UsageError(f"Expected homographies [frames, 3, 3] of finite numbers; found shape {list(matrices.shape)}.")
    (rows, cols), (height, width) = grid, image
    y, x = np.meshgrid((np.arange(rows) + 0.5) * height / rows, (np.arange(cols) + 0.5) * width / cols, indexing="ij")
    centres = np.stack([x.ravel(), y.ravel(), np.ones(rows * cols)])
    moved = matrices @ centres  # [frames, 3, tokens]
    ahead = moved[:, 2] > 1e-9
    scale = np.where(ahead, moved[:, 2], 1.0)
    col, row = np.floor(moved[:, 0] / scale * cols / width), np.floor(moved[:, 1] / scale * rows / height)
    seen = ahead & (col >= 0) & (col < cols) & (row >= 0) & (row < rows)
    seen[0] = False
    return np.where(seen, row * cols + col, -1).astype(np.int64)


def at_rest(frames: int, tokens: int) -> Ints:
    """`warp` of a camera that does not move: int64 [frames, tokens]."""
    found = np.tile(np.arange(tokens, dtype=np.int64), (frames, 1))
    found[0] = -1
    return found
