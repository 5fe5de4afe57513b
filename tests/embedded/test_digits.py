"""The task: deterministic, split cleanly, one right answer each."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from exporter.embedded import digits


def test_held_out_is_deterministic() -> None:
    for kind in digits.KINDS:
        first, second, other = (digits.held_out(kind, 20, seed) for seed in (3, 3, 4))
        for a, b in zip(first, second, strict=True):
            assert (a.kind, a.question, a.answer) == (b.kind, b.question, b.answer)
            np.testing.assert_array_equal(a.frames, b.frames)
        assert any((a.frames != b.frames).any() for a, b in zip(first, other, strict=True))


def test_more_questions_keep_the_first_ones() -> None:
    few, more = digits.held_out("moved", 3), digits.held_out("moved", 6)
    assert all((a.frames == b.frames).all() for a, b in zip(few, more[:3], strict=True))


def test_shapes_and_types() -> None:
    for kind, frames in (("cell", 1), ("count", 1), ("moved", digits.FRAMES)):
        example = digits.held_out(kind, 1)[0]
        assert example.kind == kind
        assert example.frames.shape == (frames, 64, 64, 3)
        assert example.frames.dtype == np.uint8
        assert example.frames.max() > 128


def test_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="cell, count, moved"):
        digits.held_out("colour", 1)


def test_split_is_disjoint_and_complete() -> None:
    (train, train_labels), (held, held_labels) = digits.scans(held_out=False), digits.scans(held_out=True)
    assert len(train) + len(held) == 1797
    assert len(held) == 400
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in held}
    assert set(train_labels.tolist()) == set(held_labels.tolist()) == set(range(10))


def test_mosaic_shows_what_its_grid_says() -> None:
    rng, source = np.random.default_rng(0), digits.glyphs(held_out=True)
    for _ in range(50):
        image, grid = digits.mosaic(rng, source)
        ink = image.reshape(4, 16, 4, 16).max((1, 3))
        np.testing.assert_array_equal(ink > 0, grid != digits.EMPTY)
        assert 3 <= (grid != digits.EMPTY).sum() <= 8


def test_exactly_one_digit_moves_and_the_rest_is_still() -> None:
    rng, source = np.random.default_rng(0), digits.glyphs(held_out=True)
    for _ in range(50):
        frames, grids, moved = digits.clip(rng, source)
        changes = [(before, after) for before, after in pairwise(grids) if (before != after).any()]
        assert len(changes) == 1
        before, after = changes[0]
        left, arrived = (
            np.argwhere((before != after) & (after == digits.EMPTY)),
            np.argwhere((before != after) & (before == digits.EMPTY)),
        )
        assert len(left) == len(arrived) == 1
        assert before[tuple(left[0])] == after[tuple(arrived[0])] == moved
        still = (grids == grids[0]).all(0).repeat(16, 0).repeat(16, 1)
        assert all((frame[still] == frames[0][still]).all() for frame in frames)


def test_answers_follow_from_the_grid() -> None:
    rng, source = np.random.default_rng(5), digits.glyphs(held_out=True)
    _, grid = digits.mosaic(rng, source)
    example = digits.held_out("count", 1, seed=1)[0]
    assert example.answer in digits.NUMBERS
    assert example.question == digits.count_question(
        next(d for d, plural in enumerate(digits.PLURALS) if plural in example.question)
    )
    assert all(
        digits.cell_question(r, c) == f"Which digit is in row {r + 1}, column {c + 1}?" for r, c in np.ndindex(4, 4)
    )
    assert {digits.asked_digit(rng, grid) for _ in range(200)} == set(range(10))


def test_the_box_of_a_cell_holds_its_digit() -> None:
    for example in digits.held_out("cell", 20):
        assert example.box is not None
        left, top, right, bottom = example.box
        assert example.question == f"Which digit is in row {top // 16 + 1}, column {left // 16 + 1}?"
        assert (right - left, bottom - top) == (16, 16) and example.frames[0, top:bottom, left:right].any()
    assert digits.held_out("count", 1)[0].box is None
