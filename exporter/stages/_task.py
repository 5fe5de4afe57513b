"""Questions with known answers: the embedded set, or the user's own as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from exporter.errors import UsageError
from exporter.runtime import images


@dataclass(frozen=True)
class Question:
    """frames: PIL images, as many as the graphs take. answer: what the decoded output must equal, case and space aside."""

    kind: str
    frames: list[Image.Image]
    question: str
    answer: str

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """uint8 [frames, height, width, 3]"""
        return np.stack([np.asarray(images.rgb(f)) for f in self.frames])


def embedded(frames: int, per_kind: int, seed: int = 0) -> list[Question]:
    """Held-out questions of the embedded task whose clips have this many frames."""
    from exporter.embedded import digits

    found = []
    for kind in digits.KINDS:
        examples = digits.held_out(kind, per_kind, seed)
        if len(examples[0].frames) == frames:
            found += [Question(e.kind, [Image.fromarray(f) for f in e.frames], e.question, e.answer) for e in examples]
    return found


def for_calibration(frames: int, count: int = 64) -> list[Question]:
    """Embedded questions of all kinds on digits that training has seen; a clip's frames are repeated or left out to be so many."""
    from exporter.embedded import digits

    kinds = [kind for kind in digits.KINDS if (kind == "moved") == (frames > 1)]
    found = []
    for kind in kinds:
        for e in digits.seen(kind, count // len(kinds)):
            chosen = [e.frames[i * len(e.frames) // frames] for i in range(frames)]
            found.append(Question(e.kind, [Image.fromarray(f) for f in chosen], e.question, e.answer))
    return found


def from_file(path: Path, frames: int) -> list[Question]:
    """One JSON object a line: {"images": [paths], "question": text, "answer": text, "kind": text (optional)}.

    Paths are relative to the file. Raises UsageError with the line number.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise UsageError(f"Questions {path} cannot be read: {e.strerror}.") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            paths, question, answer = entry["images"], str(entry["question"]), str(entry["answer"])
        except (ValueError, KeyError, TypeError) as e:
            raise UsageError(
                f'{path}, line {number}: expected {{"images": […], "question": "…", "answer": "…"}} ({type(e).__name__}: {e}).'
            ) from e
        if len(paths) != frames:
            raise UsageError(f"{path}, line {number}: {len(paths)} images, but the graphs take {frames} (--frames).")
        loaded = [images.load(path.parent / p) for p in paths]
        found.append(Question(str(entry.get("kind", "custom")), loaded, question, answer))
    if not found:
        raise UsageError(f"{path} holds no question.")
    return found


def right(answer: str, expected: str) -> bool:
    return answer.strip().casefold() == expected.strip().casefold()


def kinds(questions: Sequence[Question]) -> list[str]:
    return list(dict.fromkeys(q.kind for q in questions))
