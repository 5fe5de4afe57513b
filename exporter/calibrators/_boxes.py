"""Which visual tokens lie in a box of an image, whatever the model makes of an image before it sees it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from exporter.graphset import GraphSet, ImageSpec, VisualLayout
from exporter.runtime.images import preprocess
from exporter.stages._task import Box

Mask = npt.NDArray[np.bool_]


def inside(box: Box, size: tuple[int, int], graphs: GraphSet, index: npt.NDArray[np.int64]) -> Mask:
    """The visual tokens whose patch holds some of the box, of one image: bool [kept].

    The box is drawn and goes the way of the images: resized, cut into tiles, padded, cropped.

    Args:
        size: of the image, width and height in pixels. graphs: of a model whose visual tokens have a raster. index: int64
            [kept], as `reduce` returns it.
    """
    visual = graphs.visual
    each = visual.total // visual.placeholders
    patches = (index >= 0) & (index % each < each - visual.fixed)
    found = np.zeros(len(index), np.bool_)
    found[patches] = _patches(_pixels(box, size, graphs.image), visual)[visual.of_grid(index[patches])]
    return found


def _pixels(box: Box, size: tuple[int, int], spec: ImageSpec) -> Mask:
    """Where the box is in `pixel_values`: bool [parts, height, width]."""
    spec = replace(spec, resample=Image.Resampling.BOX)  # which draws nothing beyond a pixel's own area
    width, height = size
    left, top, right, bottom = box
    drawn = np.zeros((height, width), np.uint8)
    drawn[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = 255
    with_box, without = (preprocess([Image.fromarray(x)], spec)[0] for x in (drawn, np.zeros_like(drawn)))
    covered: Mask = (with_box != without).any(1)
    return covered


def _patches(pixels: Mask, visual: VisualLayout) -> Mask:
    """bool [tokens], of all parts of an image, one after another, row by row."""
    assert visual.grid is not None, "tokens without a raster lie nowhere"
    rows, columns = visual.grid
    groups = (visual.total - visual.fixed * visual.placeholders) // (rows * columns)
    parts = np.logical_or.reduce(pixels.reshape(groups, -1, *pixels.shape[1:]), axis=1)
    ys = np.linspace(0, parts.shape[1], rows + 1).round().astype(int)
    xs = np.linspace(0, parts.shape[2], columns + 1).round().astype(int)
    patches = itertools.product(parts, itertools.pairwise(ys), itertools.pairwise(xs))
    return np.array([part[slice(*y), slice(*x)].any() for part, y, x in patches])
