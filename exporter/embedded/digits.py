"""Questions about mosaics and short clips of real handwritten digits: the embedded model's task.

A *mosaic* is a 64×64 image of 4×4 cells, some of them holding a handwritten digit. A *clip* is four such frames in
which one digit moves to an empty cell between two frames and all others stay exactly where they are. Three kinds of
question, each with one right answer:

- `cell`: "Which digit is in row 2, column 3?" → "7" (rows and columns count from 1, from the top left)
- `count`: "How many sevens are there?" → "two"
- `moved`: "Which digit moved?", on a clip → "7"

The digit images (`digits.npz`) are the 1,797 of scikit-learn's `load_digits`, that is the test part of UCI's "Optical
Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, doi:10.24432/C50P49, CC BY 4.0). The file also fixes which
of them are held out: a held-out question never shows a digit image that training has seen.

Only numpy and PIL, so that benchmarks can ask questions on a device without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

KINDS: tuple[str, ...] = ("cell", "count", "moved")
GRID = 4
"""Cells per side of a mosaic."""
CELL = 16
"""Pixels per side of a cell."""
GLYPH = 14
"""Pixels per side of a digit; it sits in its cell with an offset of 0, 1 or 2 pixels each way."""
IMAGE = GRID * CELL
FRAMES = 4
"""Frames of a clip."""
EMPTY = 10
"""The label of a cell without a digit."""
# fmt: off
NUMBERS: tuple[str, ...] = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight",
    "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen",
)
"""The answers to `count`: as many as a mosaic can hold."""
PLURALS: tuple[str, ...] = (
    "zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines",
)
# fmt: on
MOVED_QUESTION = "Which digit moved?"

_DATA = Path(__file__).resolve().parent / "digits.npz"


@dataclass(frozen=True)
class Example:
    """A question, what it is about, and its answer.

    Attributes:
        kind: one of `KINDS`.
        frames: uint8 [frames, 64, 64, 3], RGB; one frame for `cell` and `count`, four for `moved`.
        question: the user's sentence, without chat template.
        answer: the one right answer.
        box: left, top, right and bottom of the cell that it is read from, in pixels; None where that is no single one.
    """

    kind: str
    frames: np.ndarray
    question: str
    answer: str
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Glyphs:
    """Digit images to draw from.

    Attributes:
        images: uint8 [glyphs, 14, 14], ink is bright.
        labels: int64 [glyphs], 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray

    @cached_property
    def of_label(self) -> list[np.ndarray]:
        """Per label, int64 [n]: the indices of its glyphs."""
        return [np.flatnonzero(self.labels == label) for label in range(10)]


@lru_cache(maxsize=2)
def scans(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """The original scans of one side of the split.

    Returns:
        images: uint8 [scans, 8, 8], ink from 0 to 16.
        labels: int64 [scans], 0 to 9.
    """
    with np.load(_DATA) as data:
        chosen = data["held_out"] == held_out
        return data["images"][chosen], data["labels"][chosen].astype(np.int64)


@lru_cache(maxsize=2)
def glyphs(held_out: bool) -> Glyphs:
    """The digit images of one side of the split, enlarged to 14×14 pixels."""
    images, labels = scans(held_out)
    return Glyphs(np.stack([_enlarge(image) for image in images]), labels)


def augmented(rng: np.random.Generator, copies: int) -> Glyphs:
    """The training digits with `copies` distorted variants each: rotated, sheared, scaled, thinned or thickened."""
    images, labels = scans(held_out=False)
    variants = [_enlarge(image, _distortion(rng), rng.uniform(0.75, 1.3)) for _ in range(copies) for image in images]
    plain = glyphs(held_out=False).images
    return Glyphs(np.concatenate([plain, np.stack(variants)]), np.tile(labels, copies + 1))


def mosaic(rng: np.random.Generator, source: Glyphs) -> tuple[np.ndarray, np.ndarray]:
    """A mosaic of 3 to 8 digits, of few enough classes that some repeat.

    Returns:
        image: uint8 [64, 64], grey.
        grid: int64 [4, 4], the label in each cell, `EMPTY` where there is none.
    """
    occupied = int(rng.integers(3, 9))
    cells = rng.permutation(GRID * GRID)[:occupied]
    picks = _pick(rng, source, occupied, classes=int(rng.integers(3, 8)))
    image, grid = _blank()
    for cell, pick in zip(cells, picks, strict=True):
        _draw(image, grid, int(cell), rng.integers(0, CELL - GLYPH + 1, 2), source, int(pick))
    return image, grid


def clip(rng: np.random.Generator, source: Glyphs) -> tuple[np.ndarray, np.ndarray, int]:
    """A clip of 3 to 6 digits, one of which moves to an empty cell at some point.

    Returns:
        frames: uint8 [4, 64, 64], grey.
        grids: int64 [4, 4, 4], the label in each frame's cells, `EMPTY` where there is none.
        moved: the label of the digit that moves.
    """
    occupied = int(rng.integers(3, 7))
    cells = rng.permutation(GRID * GRID)[: occupied + 1]  # the last one is where the first digit goes
    picks = _pick(rng, source, occupied, classes=10)
    offsets = rng.integers(0, CELL - GLYPH + 1, (occupied, 2))
    moves_before = int(rng.integers(1, FRAMES))
    frames, grids = [], []
    for frame in range(FRAMES):
        image, grid = _blank()
        for digit in range(occupied):
            here = cells[-1] if digit == 0 and frame >= moves_before else cells[digit]
            _draw(image, grid, int(here), offsets[digit], source, int(picks[digit]))
        frames.append(image)
        grids.append(grid)
    return np.stack(frames), np.stack(grids), int(source.labels[picks[0]])


def cell_question(row: int, column: int) -> str:
    """The question about a cell; row and column count from 0 here and from 1 in the sentence."""
    return f"Which digit is in row {row + 1}, column {column + 1}?"


def count_question(digit: int) -> str:
    """The question how often a digit occurs."""
    return f"How many {PLURALS[digit]} are there?"


def asked_digit(rng: np.random.Generator, grid: np.ndarray) -> int:
    """The digit to ask a count of: three times in four one that is there, else any."""
    present = np.unique(grid[grid != EMPTY])
    return int(rng.choice(present)) if rng.random() < 0.75 else int(rng.integers(0, 10))


def held_out(kind: str, count: int, seed: int = 0) -> list[Example]:
    """Questions on held-out digits; the same arguments give the same questions.

    Args:
        kind: one of `KINDS`.
        count: how many questions, each about an image or clip of its own.
        seed: another seed, other questions.
    Raises:
        ValueError: `kind` is not one of `KINDS`.
    """
    return _examples(kind, count, seed, held_out=True)


def seen(kind: str, count: int, seed: int = 0) -> list[Example]:
    """As `held_out`, on digits that training has seen: for what must not look at what is evaluated."""
    return _examples(kind, count, seed, held_out=False)


def _examples(kind: str, count: int, seed: int, held_out: bool) -> list[Example]:
    if kind not in KINDS:
        raise ValueError(f"No question kind {kind!r}. Known kinds: {', '.join(KINDS)}.")
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    return [_example(kind, rng, glyphs(held_out)) for _ in range(count)]


def _example(kind: str, rng: np.random.Generator, source: Glyphs) -> Example:
    if kind == "moved":
        frames, _, moved = clip(rng, source)
        return Example(kind, _rgb(frames), MOVED_QUESTION, str(moved))
    image, grid = mosaic(rng, source)
    frames = _rgb(image[None])
    if kind == "count":
        digit = asked_digit(rng, grid)
        return Example(kind, frames, count_question(digit), NUMBERS[int((grid == digit).sum())])
    row, column = map(int, rng.choice(np.argwhere(grid != EMPTY)))
    box = (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL)
    return Example(kind, frames, cell_question(row, column), str(grid[row, column]), box)


def _pick(rng: np.random.Generator, source: Glyphs, count: int, classes: int) -> np.ndarray:
    """int64 [count]: glyph indices whose labels come from `classes` random classes."""
    labels = rng.choice(rng.permutation(10)[:classes], count)
    return np.array([rng.choice(source.of_label[label]) for label in labels])


def _blank() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((IMAGE, IMAGE), np.uint8), np.full((GRID, GRID), EMPTY, np.int64)


def _draw(image: np.ndarray, grid: np.ndarray, cell: int, offset: np.ndarray, source: Glyphs, pick: int) -> None:
    """Draw glyph `pick` into a cell, `offset` int [2] pixels from its top left corner, and note its label."""
    row, column = divmod(cell, GRID)
    top, left = row * CELL + int(offset[0]), column * CELL + int(offset[1])
    image[top : top + GLYPH, left : left + GLYPH] = source.images[pick]
    grid[row, column] = source.labels[pick]


def _rgb(grey: np.ndarray) -> np.ndarray:
    """uint8 [frames, 64, 64] → uint8 [frames, 64, 64, 3]."""
    return np.repeat(grey[..., None], 3, axis=-1)


def _enlarge(scan: np.ndarray, distortion: tuple[float, ...] | None = None, gain: float = 1.0) -> np.ndarray:
    """uint8 [8, 8], 0 to 16 → uint8 [14, 14], 0 to 255.

    Args:
        distortion: an affine map as PIL takes it (output pixel → input pixel).
        gain: multiplies the ink.
    """
    ink = np.clip(scan.astype(np.float32) * (255 / 16) * gain, 0, 255).astype(np.uint8)
    image = Image.fromarray(ink).resize((GLYPH, GLYPH), Image.Resampling.BILINEAR)
    if distortion is not None:
        image = image.transform((GLYPH, GLYPH), Image.Transform.AFFINE, distortion, Image.Resampling.BILINEAR)
    return np.asarray(image)


def _distortion(rng: np.random.Generator) -> tuple[float, ...]:
    """A random affine map about the glyph's middle: ±12° rotation, ±0.2 shear, 0.87 to 1.15 scale, ±1 pixel shift."""
    angle, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.2, 0.2)
    scale = rng.uniform(0.87, 1.15, 2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.diag(scale) @ rotation @ np.array([[1, shear], [0, 1]])
    middle = np.full(2, (GLYPH - 1) / 2)
    shift = middle - matrix @ middle + rng.uniform(-1, 1, 2)
    return (*matrix[0], shift[0], *matrix[1], shift[1])
