"""Draws which visual tokens a reduction kept, on the picture itself."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from exporter.errors import UsageError
from exporter.graphset import tokens_in_words

KEPT = (255, 196, 61)
ANCHOR = (74, 222, 255)
STRIP, INK, QUIET, GUTTER = (22, 24, 29), (240, 241, 243), (150, 155, 165), (22, 24, 29)
SINGLE, TILE, COLUMNS = 384, 216, 6
"""Least width of a picture, and of one frame of a clip, in pixels; frames in a row before the next row begins."""
DIM = 0.34
"""Brightness of a dropped token, which is grey besides."""


def draw(
    frames: npt.NDArray[np.uint8],
    index: npt.NDArray[np.int64],
    grid: tuple[int, int],
    *,
    anchors: npt.NDArray[np.int64] | None = None,
    labels: Sequence[str] | None = None,
    caption: str | None = None,
) -> Image.Image:
    """Kept tokens at full brightness in a thin outline, dropped ones dim and grey; below, what was kept in words.

    Args:
        frames: uint8 [frames, height, width, 3].
        index: int64 [kept], positions among frames × rows × cols tokens, frame by frame, row by row; −1 is ignored.
        grid: rows and columns of one frame's tokens.
        anchors: int64 [n], tokens that others were merged into; outlined in another colour.
        labels: one per frame, over the frames of a clip; without it "frame 1", …
        caption: what stands before the count, such as the method.
    Raises:
        UsageError: an index outside the tokens.
    """
    count, (rows, cols) = len(frames), grid
    total = count * rows * cols
    merged = _mask(anchors, total, "anchors").reshape(count, rows, cols)
    kept = _mask(index, total, "index").reshape(count, rows, cols) | merged
    scale = max(1, -(-(SINGLE if count == 1 else TILE) // frames.shape[2]))
    tiles = [_tile(frames[i], kept[i], merged[i], scale) for i in range(count)]
    names = [] if count == 1 else list(labels or (f"frame {i + 1}" for i in range(count)))
    words = tokens_in_words(total, int(kept.sum()))
    return _sheet(tiles, names, f"{caption}  ·  {words}" if caption else words, bool(merged.any()))


def png(image: Image.Image) -> bytes:
    """The picture as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _mask(index: npt.NDArray[np.int64] | None, total: int, name: str) -> npt.NDArray[np.bool_]:
    mask = np.zeros(total, bool)
    if index is not None:
        real = np.asarray(index).ravel()
        real = real[real != -1]
        if real.size and not (real.min() >= 0 and real.max() < total):
            raise UsageError(
                f"Overlay {name} goes from {real.min()} to {real.max()}; there are {total} tokens (0 to {total - 1})."
            )
        mask[real] = True
    return mask


def _tile(
    frame: npt.NDArray[np.uint8], kept: npt.NDArray[np.bool_], merged: npt.NDArray[np.bool_], scale: int
) -> Image.Image:
    """One frame, enlarged to whole multiples so that its pixels stay sharp."""
    picture = frame.repeat(scale, 0).repeat(scale, 1)
    height, width = picture.shape[:2]
    ys = np.linspace(0, height, kept.shape[0] + 1).round().astype(int)
    xs = np.linspace(0, width, kept.shape[1] + 1).round().astype(int)
    bright = kept.repeat(np.diff(ys), 0).repeat(np.diff(xs), 1)[..., None]
    grey = (picture @ np.array([0.299, 0.587, 0.114]))[..., None] * DIM
    image = Image.fromarray(np.where(bright, picture, grey).round().astype(np.uint8))
    pen = ImageDraw.Draw(image)
    thick = 2 if min(np.diff(ys).min(), np.diff(xs).min()) >= 28 else 1
    for row, col in zip(*np.nonzero(kept), strict=True):
        box = (int(xs[col]), int(ys[row]), int(xs[col + 1]) - 1, int(ys[row + 1]) - 1)
        pen.rectangle(box, outline=ANCHOR if merged[row, col] else KEPT, width=thick)
    return image


def _sheet(tiles: Sequence[Image.Image], names: Sequence[str], words: str, legend: bool) -> Image.Image:
    """Tiles in rows, their names above, the words below."""
    width, height = tiles[0].size
    columns = min(len(tiles), COLUMNS)
    rows = -(-len(tiles) // columns)
    gap, head, strip = 8, 22 if names else 0, 34 * (2 if legend else 1)
    across = columns * width + (columns - 1) * gap
    sheet = Image.new("RGB", (across, rows * (head + height) + (rows - 1) * gap + strip), GUTTER)
    pen = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x, y = i % columns * (width + gap), i // columns * (head + height + gap)
        if names:
            _text(pen, x + 6, y + 3, names[i], 13, QUIET)
        sheet.paste(tile, (x, y + head))
    top = sheet.height - strip
    pen.rectangle((0, top, across, sheet.height), fill=STRIP)
    size = 16
    while size > 9 and _text(None, 0, 0, words, size, INK) > across - 20:
        size -= 1
    _text(pen, 10, top + 8, words, size, INK)
    if legend:
        left = 10.0
        for colour, name in ((KEPT, "kept"), (ANCHOR, "merged into")):
            pen.rectangle((left, top + 42, left + 11, top + 53), outline=colour, width=2)
            left = _text(pen, left + 18, top + 39, name, 13, QUIET) + 18
    return sheet


def _text(
    pen: ImageDraw.ImageDraw | None, x: float, y: float, text: str, size: int, fill: tuple[int, int, int]
) -> float:
    """Write, and return where the text ends. Pillow's own font has no →, ×, – or ·: these are drawn."""
    font = ImageFont.load_default(size)
    middle, line = y + size * 0.68, max(1, round(size / 11))
    for piece in _pieces(text):
        if piece not in "→×–·":
            if pen:
                pen.text((x, y), piece, fill, font)
            x += font.getlength(piece)
            continue
        wide = size * {"→": 1.15, "×": 0.55, "–": 0.6, "·": 0.3}[piece]
        a, b = x + size * 0.1, x + wide - size * 0.1
        if pen and piece == "→":
            pen.line((a, middle, b, middle), fill, line)
            barb = size * 0.22
            pen.line((b - barb, middle - barb, b, middle, b - barb, middle + barb), fill, line)
        elif pen and piece == "×":
            half = (b - a) / 2
            pen.line((a, middle - half, b, middle + half), fill, line)
            pen.line((a, middle + half, b, middle - half), fill, line)
        elif pen and piece == "–":
            pen.line((a, middle, b, middle), fill, line)
        elif pen:
            pen.ellipse((a, middle - line, a + 2 * line, middle + line), fill)
        x += wide
    return x


def _pieces(text: str) -> list[str]:
    """Split a text into runs of what the font has and single characters that are drawn."""
    pieces = [""]
    for character in text:
        if character in "→×–·":
            pieces += [character, ""]
        else:
            pieces[-1] += character
    return [piece for piece in pieces if piece]
