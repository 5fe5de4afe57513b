"""Frames of a video file, by PyAV (the extra `video`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from exporter.errors import EnvironmentMismatch, UsageError

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")


def frames(path: Path, pick: Callable[[int], Sequence[int]]) -> list[Image.Image]:
    """The frames that `pick` chooses of so many, upright, RGB.

    Raises:
        EnvironmentMismatch: PyAV is missing. UsageError: the file is missing, or no video.
    """
    av = _decoder(path)
    if not path.is_file():
        raise UsageError(f"There is no video {path}.")
    try:
        wanted = list(pick(_length(av, path)))
        found: dict[int, Image.Image] = {}
        for number, frame in enumerate(_decoded(av, path)):
            if number in wanted:
                found[number] = _upright(frame)
            if number >= max(wanted):
                break
    except (av.FFmpegError, IndexError) as e:
        raise UsageError(f"{path} cannot be read as a video: {e}.") from e
    if not found:
        raise UsageError(f"{path} cannot be read as a video: none of its frames can be decoded.")
    # Headers promise frames that a file cut short does not have: its last one stands for them.
    return [found.get(number, found[max(found)]) for number in wanted]


def _decoder(path: Path) -> Any:
    try:
        import av
    except ImportError as e:
        raise EnvironmentMismatch(
            f"{path} is a video, and nothing here decodes it. `pip install 'edgetrim[video]'` brings PyAV; or extract its frames into "
            "a folder and give that."
        ) from e
    return av


def _length(av: Any, path: Path) -> int:
    """Frames as the header says, or as many as there are."""
    with av.open(str(path)) as container:
        promised = container.streams.video[0].frames
    return int(promised) or sum(1 for _ in _decoded(av, path))


def _decoded(av: Any, path: Path) -> Iterator[Any]:
    with av.open(str(path)) as container:
        yield from container.decode(container.streams.video[0])


def _upright(frame: Any) -> Image.Image:
    """A phone films lying and says how to turn it."""
    image: Image.Image = frame.to_image()
    turn = getattr(frame, "rotation", 0)
    return image.rotate(turn, expand=True) if turn else image
