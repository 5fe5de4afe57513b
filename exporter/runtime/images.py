"""Images and clips to `pixel_values`, bit for bit as Hugging Face's Pillow image processors do it. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from exporter.errors import UsageError
from exporter.graphset import ImageSpec
from exporter.runtime import video

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What counts as an image in a folder of frames."""


def load(path: Path) -> Image.Image:
    """The image of a file (its first frame), upright as the camera meant it, RGB."""
    return _read(path, [0])[0]


def clip(source: Path | Sequence[Path], count: int) -> list[Image.Image]:
    """`count` frames, evenly spread from the first to the last.

    Args:
        source: an image, a video, an animated GIF, WebP or APNG, a folder of images (in the order of the numbers in their
            names), or the frames' files in order. Fewer frames than `count` are repeated: a still image is a clip at rest.
        count: frames wanted, >= 1.
    """
    if isinstance(source, Path) and source.is_dir():
        source = sorted((p for p in source.iterdir() if p.suffix.lower() in SUFFIXES), key=_natural)
    if isinstance(source, Path) and source.suffix.lower() in video.SUFFIXES:
        return video.frames(source, lambda length: sample(length, count))
    if isinstance(source, Path):
        return _read(source, sample(_length(source), count))
    if not source:
        raise UsageError(f"No frames: expected a folder or list of images ({', '.join(SUFFIXES)}).")
    return [load(source[i]) for i in sample(len(source), count)]


def sample(length: int, count: int) -> list[int]:
    """`count` indices from 0 to length - 1, evenly spread, both ends included; one index is the middle.

    >>> sample(9, 3), sample(2, 4), sample(5, 1)
    ([0, 4, 8], [0, 0, 1, 1], [2])
    """
    if count == 1:
        return [(length - 1) // 2]
    return [int(i * (length - 1) / (count - 1) + 0.5) for i in range(count)]


def preprocess(frames: Sequence[Image.Image], spec: ImageSpec) -> npt.NDArray[np.float32]:
    """Resize, cut into tiles or crop the centre, scale to 0..1, normalise.

    Args:
        frames: images of any size, one per frame.
        spec: what the model expects.
    Returns:
        float32 [1, frames * spec.parts, 3, height, width]; the tiles of an image are neighbours, row by row.
    """
    # A pixel has 256 values per channel: the arithmetic is done once per value, as the image processors do it
    # (scaled in float64, normalised in float32), and looked up.
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    table = (scaled[None, :] - mean[:, None]) / std[:, None]
    out = np.empty((1, len(frames) * spec.parts, 3, spec.height, spec.width), np.float32)
    for i, pixels in enumerate(part for frame in frames for part in _parts(rgb(frame), spec)):
        for channel in range(3):
            out[0, i, channel] = table[channel][pixels[:, :, channel]]
    return out


def rgb(image: Image.Image) -> Image.Image:
    """Three channels; what is transparent lies on white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, (255, 255, 255, 255)), clear).convert("RGB")


def _parts(image: Image.Image, spec: ImageSpec) -> Iterator[npt.NDArray[np.uint8]]:
    """The pictures [height, width, 3] that an image becomes."""
    if spec.longest_edge:
        image = _to_longest_edge(image, spec)
    resized = _resize(image, spec)
    if spec.overview == "none" and spec.tiles == (1, 1):
        yield _crop(np.asarray(resized), spec.height, spec.width)
        return
    whole = resized if spec.overview == "last, of the resized image" else image
    overview = np.asarray(whole.resize((spec.width, spec.height), resample=Image.Resampling(spec.resample)))
    if spec.overview == "first":
        yield overview
    pixels, (rows, columns) = np.asarray(resized), spec.tiles
    for row in range(rows):
        for column in range(columns):
            top, left = row * spec.height, column * spec.width
            yield pixels[top : top + spec.height, left : left + spec.width]
    if spec.overview.startswith("last"):
        yield overview


def _to_longest_edge(image: Image.Image, spec: ImageSpec) -> Image.Image:
    width, height = image.size
    if width >= height:
        short = int(spec.longest_edge / (width / height))
        size = spec.longest_edge, short + short % 2
    else:
        short = int(spec.longest_edge * (width / height))
        size = short + short % 2, spec.longest_edge
    return image.resize((max(size[0], 1), max(size[1], 1)), resample=Image.Resampling(spec.resample))


def _resize(image: Image.Image, spec: ImageSpec) -> Image.Image:
    if spec.resize == "padded":
        image = _squared(image, spec)
    width, height = image.size
    if spec.resize != "shortest_edge":
        size = (spec.resize_width, spec.resize_height)
    else:
        short = spec.resize_height
        size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    return image.resize(size, resample=Image.Resampling(spec.resample))


def _squared(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """In the middle of a square in the colour of the mean."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in spec.mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _crop(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """The centre [height, width] of [rows, columns, 3]; what lies outside the image is black.

    Where an axis is too short, the image sits half a pixel lower and further right than a centred one if the difference
    is odd: that is how Hugging Face's `center_crop` rounds.
    """
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels
    padded = np.zeros((max(rows, height), max(columns, width), 3), np.uint8)
    top, left = -((rows - padded.shape[0]) // 2), -((columns - padded.shape[1]) // 2)
    padded[top : top + rows, left : left + columns] = pixels
    top, left = top + (rows - height) // 2, left + (columns - width) // 2
    return padded[top : top + height, left : left + width]


def _length(path: Path) -> int:
    with _opened(path) as image:
        return getattr(image, "n_frames", 1)


def _read(path: Path, indices: Sequence[int]) -> list[Image.Image]:
    frames = {}
    with _opened(path) as image:
        for i in sorted(set(indices)):
            if i:
                image.seek(i)
            try:
                frames[i] = rgb(ImageOps.exif_transpose(image))
            except OSError as e:
                raise UsageError(f"{path} cannot be read: {e}. Is the file complete?") from e
    return [frames[i] for i in indices]


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError as e:
        raise UsageError(f"There is no image {path}.") from e
    except UnidentifiedImageError as e:
        raise UsageError(f"{path} is no image that Pillow reads. Expected one of: {', '.join(SUFFIXES)}.") from e
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e}.") from e


def _natural(path: Path) -> list[tuple[int, str]]:
    """frame_2 before frame_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]
