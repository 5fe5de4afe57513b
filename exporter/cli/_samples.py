"""The images a verb is about: the user's files, or a held-out sample of the embedded task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import UsageError

if TYPE_CHECKING:
    from exporter.stages._task import Question


def frames(images: Sequence[Path], clips: Sequence[Path], count: int) -> list[Any]:
    """The user's images, as many as the model takes; [] if none were given.

    Raises:
        UsageError: both kinds, another number of images, or a file that is no image.
    """
    from exporter.runtime import images as reader

    if images and clips:
        raise UsageError("Give --image or --clip, not both.")
    if clips:
        return reader.clip(clips[0] if len(clips) == 1 else list(clips), count)
    if images and len(images) != count:
        raise UsageError(
            f"{len(images)} images for a model that takes {count}. Give --image {count} times, or --clip with a folder of frames or "
            "an animated image, from which frames are sampled."
        )
    return [reader.load(path) for path in images]


def sample(checkpoint: str, count: int) -> Question:
    """A held-out question of the embedded task about this many frames.

    Raises:
        UsageError: another model, or frames the task does not have: the user has to give images.
    """
    from exporter.job import EMBEDDED

    if checkpoint != EMBEDDED:
        raise UsageError("Which image? Give --image PATH, or --clip PATH.")
    from exporter.stages import _task

    found = _task.embedded(count, 1, seed=1)
    if not found:
        raise UsageError(
            f"The embedded task has images and clips of 4 frames, none of {count}. Give --image or --clip."
        )
    return found[0]
