"""Answers that survive a kill: one JSON line each, as soon as they are there. The next run asks only what is missing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from exporter import __version__
from exporter._typed import parsed
from exporter.plan import Plan
from exporter.workspace import PART
from graphs import _spec

FOLDER = f"{PART}answers"


class Answers:
    """Answers of one model, by the question's key. In memory only without a file."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.known = path, dict[str, str]()
        if path is not None and path.is_file():
            self.known = dict(_lines(path.read_text(encoding="utf-8", errors="replace")))

    def add(self, found: Mapping[str, str]) -> None:
        """Remember more; on disk before it returns."""
        self.known |= found
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            # A line break first: a line that a kill cut short stays alone.
            file.write("".join(f"\n{json.dumps({'question': k, 'answer': a})}" for k, a in found.items()) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(text: str) -> Iterable[tuple[str, str]]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short, or not ours: asked again
            entry = parsed(line)
            yield str(entry["question"]), str(entry["answer"])


def of_folder(work: Path, name: str, what: str) -> Answers:
    """Of the graphs and engines in an output folder. what: the runtime, in words."""
    return _opened(work, name, [what, *stamps(work / "graphs"), *stamps(work / "engines")])


def of_plan(work: Path, name: str, plan: Plan) -> Answers:
    """Of the PyTorch reference of a plan."""
    versions = [__version__, *(metadata.version(package) for package in ("torch", "transformers"))]
    request = plan.request
    specs = [_spec.format(step.method) for step in plan.steps]
    files = [*stamps(plan.checkpoint.folder), *([] if request.clip is None else stamps(request.clip.folder))]
    return _opened(work, name, [specs, versions, request.frames, request.image_size, *files])


def _opened(work: Path, name: str, facts: Iterable[object]) -> Answers:
    digest = hashlib.sha256(json.dumps([name, *facts], default=str).encode()).hexdigest()
    return Answers(work / FOLDER / f"{digest[:32]}.jsonl")


def stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every file, as make tells what has changed: hashing gigabytes takes too long."""
    found = [(p.relative_to(folder).as_posix(), p.stat()) for p in sorted(folder.rglob("*")) if p.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
