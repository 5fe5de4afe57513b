from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exporter.errors import UsageError
from exporter.report.overlay import ANCHOR, KEPT, draw, png

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
INDEX = np.array([0, 5, -1])


def flat(frames: int = 1, size: int = 64) -> Pixels:
    return np.full((frames, size, size, 3), (200, 60, 30), np.uint8)


def pixels(*args: Any, **kwargs: Any) -> Pixels:
    return np.asarray(draw(*args, **kwargs))


def test_kept_is_as_it_was_and_dropped_is_dim_and_grey() -> None:
    drawn = pixels(flat(), INDEX, (4, 4))
    assert drawn.shape[1] == 384
    assert drawn[48, 48].tolist() == [200, 60, 30]  # token 0, its middle
    assert drawn[144, 144].tolist() == [200, 60, 30]  # token 5
    dropped = drawn[48, 144]  # token 1
    assert len(set(dropped.tolist())) == 1
    assert dropped.max() < 0.5 * np.mean([200, 60, 30])


def test_outlines() -> None:
    drawn = pixels(flat(), INDEX, (4, 4), anchors=np.array([5]))
    assert drawn[0, 48].tolist() == list(KEPT)
    assert drawn[96, 144].tolist() == list(ANCHOR)
    assert drawn[2, 48].tolist() == [200, 60, 30]
    assert drawn[191, 300].tolist() not in (list(KEPT), list(ANCHOR))


def test_clip_is_tiled_in_a_row_with_labels() -> None:
    drawn = pixels(flat(3), np.array([16]), (4, 4), labels=["a", "b", "c"])
    assert drawn.shape[1] == 3 * 256 + 2 * 8
    assert drawn[22 + 32, 264 + 32].tolist() == [200, 60, 30]  # first token of the second frame
    assert drawn[22 + 32, 32].tolist() != [200, 60, 30]


def test_long_clip_goes_on_in_the_next_row() -> None:
    assert pixels(flat(8), np.array([0]), (4, 4)).shape[1] == 6 * 256 + 5 * 8


def test_tokens_that_do_not_divide_the_picture() -> None:
    drawn = pixels(flat(size=50), np.arange(9), (3, 3))
    assert drawn[60:70, 60:70].reshape(-1, 3).tolist() == [[200, 60, 30]] * 100


def test_nothing_kept() -> None:
    assert not (pixels(flat(), np.array([-1, -1]), (4, 4))[:384] == 200).any()


def test_large_picture_is_not_enlarged() -> None:
    assert pixels(flat(size=500), INDEX, (4, 4)).shape[1] == 500


def test_index_outside_the_tokens() -> None:
    with pytest.raises(UsageError, match="there are 16 tokens"):
        draw(flat(), np.array([16]), (4, 4))


def test_png() -> None:
    image = draw(flat(), INDEX, (4, 4), caption="visionzip")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(image)))), np.asarray(image))
    assert png(image) == png(image)
