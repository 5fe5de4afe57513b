"""Which visual tokens see a box, by arithmetic on the way that a family's images go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.calibrators._boxes import inside
from exporter.families._contract import Request
from exporter.graphset import GraphSet
from exporter.stages._reference import reference
from tests.families import tiny


def described(build: Any, folder: Path, size: tuple[int, int] | None = None, **image: Any) -> GraphSet:
    """What there is to know of a family's graphs, with its images going another way if `image` says so."""
    build(folder)
    graphs = reference(tiny.plan(folder, (), Request(1, size)))[1]
    return replace(graphs, image=replace(graphs.image, **image))


def found(graphs: GraphSet, box: tuple[float, float, float, float], size: tuple[int, int]) -> list[int]:
    return np.flatnonzero(inside(box, size, graphs, np.arange(graphs.visual.total))).tolist()


def test_an_image_of_the_model_s_size(tmp_path: Path) -> None:
    """4 × 4 tokens of 14 pixels."""
    graphs = described(tiny.llava, tmp_path, resize="exact")
    assert found(graphs, (0, 0, 14, 14), (56, 56)) == [0]
    assert found(graphs, (13, 0, 15, 14), (56, 56)) == [0, 1]
    assert found(graphs, (28, 42, 56, 56), (56, 56)) == [14, 15]
    assert found(graphs, (15.5, 20.2, 16.1, 20.9), (56, 56)) == [5]
    # twice as large, and not square
    assert found(graphs, (56, 21, 84, 28), (112, 84)) == [6]


def test_a_cropped_image(tmp_path: Path) -> None:
    """The shorter side becomes 56 pixels, the middle of the longer one is seen."""
    graphs = described(tiny.llava, tmp_path, resize="shortest_edge")
    assert found(graphs, (0, 0, 28, 56), (112, 56)) == []
    assert found(graphs, (28, 0, 42, 14), (112, 56)) == [0]
    assert found(graphs, (70, 42, 112, 56), (112, 56)) == [15]


def test_a_padded_image(tmp_path: Path) -> None:
    """A square is made of it first: a wide image lies in the two rows in the middle."""
    graphs = described(tiny.llava, tmp_path, resize="padded")
    assert found(graphs, (0, 0, 112, 56), (112, 56)) == list(range(4, 12))
    assert found(graphs, (84, 28, 112, 56), (112, 56)) == [11]


def test_merged_patches(tmp_path: Path) -> None:
    """A token of Qwen2.5-VL is 28 × 28 pixels of the resized image, wherever its windows put it."""
    graphs = described(tiny.qwen2_5_vl, tmp_path, (140, 112))
    assert graphs.visual.grid == (5, 4)
    for row in range(5):
        for column in range(4):
            box = (28 * column, 28 * row, 28 * (column + 1), 28 * (row + 1))
            assert found(graphs, box, (112, 140)) == [4 * row + column]


@pytest.mark.parametrize(
    "build", [tiny.llava_next, tiny.llava_onevision, tiny.idefics3, tiny.internvl], ids=lambda b: b.__name__
)
def test_tiles(build: Any, tmp_path: Path) -> None:
    """The box is in the tile that it lies in, and in the overview; never in what is no patch (row ends)."""
    graphs = described(build, tmp_path, (56, 112))
    assert graphs.image.tiles == (1, 2) and graphs.visual.grid is not None
    rows, columns = graphs.visual.grid
    parts = {part: set[tuple[int, int]]() for part in range(graphs.image.parts)}
    index = np.array(found(graphs, (84, 0, 112, 28), (112, 56)))  # the upper right quarter of the right half
    for token in graphs.visual.of_grid(index):
        part, place = divmod(int(token), rows * columns)
        parts[part].add(divmod(place, columns))
    assert len(graphs.visual.of_grid(index)) == len(index)
    overview = 0 if graphs.image.overview == "first" else len(parts) - 1
    right = 2 - (overview > 0)
    quarter = {(r, c) for r in range(rows // 2) for c in range(columns // 2, columns)}
    eighth = {(r, c) for r in range(rows // 2) for c in range(columns * 3 // 4, columns)}
    assert parts == {overview: eighth, right: quarter, ({0, 1, 2} - {overview, right}).pop(): set()}


def test_what_is_no_patch(tmp_path: Path) -> None:
    graphs = described(tiny.llava, tmp_path)
    whole = inside((0, 0, 56, 56), (56, 56), graphs, np.array([-1, 3, 7]))
    assert whole.tolist() == [False, True, True]
