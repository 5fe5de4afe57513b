"""Questions with known answers: the embedded set, or the user's own as JSON lines."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from exporter._typed import parsed
from exporter.errors import UsageError
from exporter.metrics import _contract as metrics
from exporter.runtime import images

if TYPE_CHECKING:
    from exporter.embedded.digits import Example

SHAPE = '{"image": PATH, "question": "…", "answer": "…"}'
KEYS = {"image", "images", "video", "question", "answer", "answers", "metric", "kind", "box", "boxes"}

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of an image, upright."""


class Files(Sequence[Image.Image]):
    """Images of a question, read from their files when they are looked at: a data set does not fit into memory."""

    def __init__(self, paths: Sequence[Path], count: int) -> None:
        self.paths, self.wanted = tuple(paths), count

    def __len__(self) -> int:
        return self.wanted

    def __iter__(self) -> Iterator[Image.Image]:
        return (images.load(p) for p in self.paths)

    def __getitem__(self, place: Any) -> Any:
        return list(self)[place]


class Clip(Files):
    """`count` frames of one path, a folder or an animated image: evenly spread from the first to the last."""

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(images.clip(self.paths[0], self.wanted))


@dataclass(frozen=True)
class Question:
    """frames: PIL images, as many as the graphs take. answer: the right one; others that are right are in `also`. metric: a name from
    exporter/metrics. source: the images' paths as the user wrote them, if they are the user's. boxes: where in the image every word of
    `answer` is read, None for one that is read nowhere; empty where that is not known."""

    kind: str
    frames: Sequence[Image.Image]
    question: str
    answer: str
    also: tuple[str, ...] = ()
    metric: str = "exact"
    source: tuple[str, ...] = ()
    boxes: tuple[Box | None, ...] = ()

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """uint8 [frames, height, width, 3]"""
        return np.stack([np.asarray(images.rgb(f)) for f in self.frames])

    def score(self, given: str) -> float:
        """0..1"""
        return metrics.load(self.metric)(given, (self.answer, *self.also))

    @cached_property
    def key(self) -> str:
        """A hash of what decides the answer: the question, and the images' bytes."""
        digest = hashlib.sha256(self.question.encode())
        if isinstance(self.frames, Files):
            for path in self.frames.paths:
                for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                    digest.update(hashlib.sha256(file.read_bytes()).digest())
        else:
            for frame in self.frames:
                digest.update(str((frame.size, frame.mode)).encode() + frame.tobytes())
        return digest.hexdigest()


def embedded(frames: int, per_kind: int, seed: int = 0) -> list[Question]:
    """Held-out questions of the embedded task whose clips have this many frames."""
    from exporter.embedded import digits

    found = []
    for kind in digits.KINDS:
        examples = digits.held_out(kind, per_kind, seed)
        if len(examples[0].frames) == frames:
            found += [
                Question(e.kind, [Image.fromarray(f) for f in e.frames], e.question, e.answer, boxes=_boxes_of(e))
                for e in examples
            ]
    return found


def for_calibration(frames: int, count: int = 64) -> list[Question]:
    """Embedded questions of all kinds on digits that training has seen; a clip's frames are repeated or left out to be so many."""
    from exporter.embedded import digits

    kinds = [kind for kind in digits.KINDS if (kind == "moved") == (frames > 1)]
    found = []
    for kind in kinds:
        for e in digits.seen(kind, count // len(kinds)):
            chosen = [e.frames[i * len(e.frames) // frames] for i in range(frames)]
            shown = [Image.fromarray(f) for f in chosen]
            found.append(Question(e.kind, shown, e.question, e.answer, boxes=_boxes_of(e)))
    return found


def _boxes_of(example: Example) -> tuple[Box | None, ...]:
    return () if example.box is None else (example.box,)


def from_file(path: Path, frames: int) -> list[Question]:
    """One JSON object a line, see docs/questions.md; paths are relative to the file. Images are there, but not read yet.

    Raises:
        UsageError: with the line number.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise UsageError(f"Questions {path} cannot be read: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"Questions {path} is not text in UTF-8 ({e}).") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_question(parsed(line), path.parent, frames))
        except UsageError as e:
            raise UsageError(f"{path}, line {number}: {e}") from e
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
            raise UsageError(f"{path}, line {number}: expected {SHAPE} ({type(e).__name__}: {e}).") from e
    if not found:
        raise UsageError(f"{path} holds no question.")
    return found


def _question(entry: Mapping[str, Any], folder: Path, frames: int) -> Question:
    if unknown := sorted(set(entry) - KEYS):
        raise UsageError(f"unknown key '{unknown[0]}'. Known: {', '.join(sorted(KEYS))}.")
    media = [key for key in ("image", "images", "video") if key in entry]
    if len(media) != 1:
        raise UsageError(f'expected one of "image", "images" and "video"; found {" and ".join(media) or "none"}.')
    given = entry[media[0]]
    written = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(p, str) for p in written):
        raise UsageError(f'"{media[0]}" must be a path{" or a list of them" if media[0] == "images" else ""}.')
    paths = [folder / p for p in written]
    for p in paths:
        if not p.exists():
            raise UsageError(f"there is no {p}.")
    if media[0] == "video":
        if len(paths) != 1:
            raise UsageError('"video" must be one path: a video, a folder of frames or an animated image.')
        shown: Files = Clip(paths, frames)
    elif len(paths) != frames:
        raise UsageError(f"{len(paths)} images, but the graphs take {frames} (--frames).")
    else:
        shown = Files(paths, frames)
    if ("answer" in entry) == ("answers" in entry):
        raise UsageError('expected one of "answer" and "answers".')
    right = [entry["answer"]] if "answer" in entry else list(entry["answers"])
    if not right or not all(isinstance(a, str | int | float) for a in right):
        raise UsageError('"answer" must be text or a number, and "answers" a list of at least one.')
    answer, *also = (str(a) for a in right)
    metric = str(entry.get("metric", "exact"))
    metrics.check(metric, (answer, *also))
    kind = str(entry.get("kind", "custom"))
    boxes = _boxes(entry, answer)
    return Question(kind, shown, str(entry["question"]), answer, tuple(also), metric, tuple(written), boxes)


def _boxes(entry: Mapping[str, Any], answer: str) -> tuple[Box | None, ...]:
    """Of every word of the answer: `boxes`, or `box` for all of them."""
    if "box" in entry and "boxes" in entry:
        raise UsageError('expected one of "box", which is of all words of the answer, and "boxes"; found both.')
    words = len(answer.split())
    if "box" in entry:
        return (_box(entry["box"]),) * words
    given = entry.get("boxes")
    if given is None:
        return ()
    if not isinstance(given, list) or len(given) != words:
        found = len(given) if isinstance(given, list) else repr(given)
        raise UsageError(f'"boxes" must be a list of {words}, one for each word of "{answer}"; found {found}.')
    return tuple(None if each is None else _box(each) for each in given)


def _box(given: Any) -> Box:
    numbers = isinstance(given, list) and all(type(x) in (int, float) and math.isfinite(x) for x in given)
    if not numbers or len(given) != 4 or not (0 <= given[0] < given[2] and 0 <= given[1] < given[3]):
        raise UsageError(f"a box must be [left, top, right, bottom] in pixels of the image; found {given!r}.")
    left, top, right, bottom = given
    return left, top, right, bottom


def kinds(questions: Sequence[Question]) -> list[str]:
    return list(dict.fromkeys(q.kind for q in questions))
