"""What a calibrator is: it asks a model questions, and answers with what goes into `--reduce`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporter import _discover, calibrators
from exporter.errors import UsageError
from exporter.job import EMBEDDED
from exporter.workspace import write_bytes
from graphs import _spec
from graphs._contract import ReductionError

if TYPE_CHECKING:
    from exporter.job import Job
    from exporter.plan import Plan
    from exporter.stages._task import Question

Log = Callable[[str], None]
OWN = 400
"""Questions of its own task that the embedded model is asked."""


@dataclass(frozen=True)
class Table:
    """What was measured, for people. columns: right-aligned where the name starts with ">". note: of what."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str


@dataclass(frozen=True)
class Calibration:
    """What was found.

    specs: reductions to export with, each with what it is called where there are several. found: the measurements, as data.
    content: of the calibrator's file, where it has one.
    """

    specs: Mapping[str, str]
    found: Mapping[str, Any]
    table: Table
    content: bytes | None = field(default=None, repr=False)


class Calibrator(ABC):
    """A frozen dataclass; its fields are its knobs, written `METHOD:knob=value,…` as a reduction's are."""

    boxed: ClassVar[bool] = False
    """Whether its questions have to say where in the image their answers are read."""
    suffix: ClassVar[str] = ""
    """Of the file that the method reads; empty where a spec says all."""

    @property
    @abstractmethod
    def least(self) -> int:
        """The fewest questions that it can work with."""

    @property
    @abstractmethod
    def reduction(self) -> str:
        """The method with as much as is known of it beforehand: a spec that has to fit the model."""

    @abstractmethod
    def calibrate(self, plan: Plan, questions: Sequence[Question], file: str, log: Log) -> Calibration:
        """Ask the model.

        Args:
            plan: the unreduced model, which `reduction` fits. file: what the specs shall call the file.
        Raises:
            UsageError: what is looked for is not in these questions, or knobs that do not fit the model.
        """


def names() -> list[str]:
    return _discover.names(calibrators)


def parse(text: str) -> Calibrator:
    """The calibrator that `NAME[:knob=value,…]` spells.

    Raises:
        UsageError: a method that needs no calibration, or none at all. ReductionError: a knob that does not fit.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if name in _spec.names() and name not in names():
        raise UsageError(f"'{name}' has nothing to calibrate. These have: {', '.join(names())}.")
    kind: type[Calibrator] = _discover.load(calibrators, "method to calibrate", name).CALIBRATOR
    if colon and not rest:
        raise ReductionError(f"'{text}' ends after the colon; write NAME or NAME:knob=value,…")
    return kind(**_spec.knobs(kind, name, rest))


def run(text: str, job: Job, questions: Path | None, output: Path | None, log: Log) -> tuple[Calibration, Path | None]:
    """Calibrate a method, and write its file. Everything is checked before the model is loaded.

    Args:
        text: `NAME[:knob=value,…]`. job: the model, without reductions. questions: JSON lines; None: some of the embedded task,
            for the embedded model only. output: the method's file; None: called like the method, here.
    Returns:
        What was found, and the file that was written.
    """
    calibrator = parse(text)
    name = text.partition(":")[0].strip()
    file = _file(calibrator, name, output)
    plan = job.plan()
    replace(job, reductions=(calibrator.reduction,)).plan()
    asked = _questions(calibrator, name, job, questions)
    found = calibrator.calibrate(plan, asked, str(file), log)
    if file is None or found.content is None:
        return found, None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"Cannot write {file}: {e.strerror}. Choose another --output.") from e
    write_bytes(file, found.content)
    return found, file


def _file(calibrator: Calibrator, name: str, output: Path | None) -> Path | None:
    if not calibrator.suffix:
        if output is not None:
            raise UsageError(f"{name} writes no file: what it finds is a spec. Leave --output out.")
        return None
    file = output or Path(f"{name}{calibrator.suffix}")
    if "," in str(file):
        raise UsageError(f"--output {file}: a spec cannot name a file with a comma in its path. Choose another.")
    there = next(p for p in (file.absolute(), *file.absolute().parents) if p.exists())
    if file.is_dir() or not os.access(there, os.W_OK) or (there != file.absolute() and not there.is_dir()):
        raise UsageError(f"Cannot write {file}: {there} is {_what(there)}. Choose another --output.")
    return file


def _what(path: Path) -> str:
    return "not to be written" if not os.access(path, os.W_OK) else "a folder" if path.is_dir() else "a file"


def _questions(calibrator: Calibrator, name: str, job: Job, path: Path | None) -> list[Question]:
    from exporter.stages import _task

    if path is not None:
        found = _task.from_file(path, job.frames)
        bare = [number for number, q in enumerate(found, 1) if not q.boxes]
        if calibrator.boxed and bare:
            raise UsageError(
                f'{path}: {name} needs to know where each answer is read, and question {bare[0]} has no "box" (nor "boxes"), as '
                f"{len(bare)} of {len(found)}. docs/questions.md says how they are written."
            )
    elif job.checkpoint != EMBEDDED:
        raise UsageError("Which questions? Pass --questions FILE.jsonl, of the kind that the model will be asked.")
    else:
        every = _task.for_calibration(job.frames, OWN)
        of_kind = ([q for q in every if q.kind == kind] for kind in _task.kinds(every))
        found = [q for q in chain(*zip(*of_kind, strict=True)) if q.boxes or not calibrator.boxed]
    if len(found) < calibrator.least:
        where = "The embedded task" if path is None else str(path)
        raise UsageError(
            f"{where} holds {len(found)} questions; {name} needs {calibrator.least} or more. Add some, or set its knobs lower."
        )
    return found
