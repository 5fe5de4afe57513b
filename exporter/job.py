"""What a user asks for: checkpoint, reductions, profile. Everything else follows from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exporter._typed import typed
from exporter.errors import ExportError, UsageError
from exporter.workspace import Workspace
from profiles import _schema
from profiles._schema import Profile

if TYPE_CHECKING:
    from exporter.plan import Plan

EMBEDDED = "embedded"
"""The name of the model that ships with the package."""
JOB = "job.json"
"""What was asked for; written last, so that graphs which have one are whole."""


def folder_of(checkpoint: str, weights: bool = True) -> Path:
    """The folder of a checkpoint as typed: a path, a hub id, or the embedded model. Raises as `checkpoint.resolve`.

    Args:
        weights: whether they are wanted too, or what is about them is enough.
    """
    from exporter.checkpoint import resolve

    if checkpoint == EMBEDDED:
        from exporter.embedded import CHECKPOINT

        return CHECKPOINT
    return resolve(checkpoint, weights=weights)


@dataclass(frozen=True)
class Job:
    """What the user asked for; written to job.json so that every verb can go on from the folder alone.

    checkpoint: as typed. profile: a name or a path. image_size: height, width or None. clip: the CLIP checkpoint that
    the model's tower came from, as typed, or None. quantizer, kv, islands: in place of the profile's. calibration: a file of questions
    for the quantizer and the islands; None: some of the embedded set's kind.
    """

    checkpoint: str
    reductions: tuple[str, ...]
    profile: str
    frames: int = 1
    image_size: tuple[int, int] | None = None
    clip: str | None = None
    quantizer: str | None = None
    calibration: str | None = None
    kv: Literal["none", "int8"] | None = None
    islands: Literal["none", "auto"] | None = None
    folder: Path | None = field(default=None, compare=False)
    """The output folder that it was read from. A profile of the user's own lies there too, and travels with the bundle."""

    def plan(self, weights: bool = True) -> Plan:
        """Check everything, in words. Raises UsageError or CheckpointError.

        Args:
            weights: False: the plan is to be reckoned with, not exported, so config.json is enough.
        """
        from exporter import methods
        from exporter.checkpoint import Checkpoint
        from exporter.families._contract import Request
        from exporter.plan import Unfit, make_plan
        from exporter.trained import check_weights

        folder = folder_of(self.checkpoint, weights)
        profile = self.loaded_profile()
        clip = None if self.clip is None else Checkpoint(folder_of(self.clip, weights))
        try:
            plan = make_plan(Checkpoint(folder), self.reductions, profile, Request(self.frames, self.image_size, clip))
        except Unfit as e:
            fitting = methods.families_in_words(methods.families(e.method))
            raise UsageError(f"{e} At its defaults it fits: {fitting}.") from e
        if weights:
            check_weights(plan)
        return plan

    def unreduced(self) -> Job:
        """The same model with all its visual tokens."""
        from exporter.plan import unreduced

        return replace(self, reductions=unreduced(self.reductions))

    @property
    def reduces(self) -> bool:
        return self.unreduced() != self

    def words(self) -> list[str]:
        """As typed behind `edgetrim run`, without the output folder."""
        size = None if self.image_size is None else "x".join(map(str, self.image_size))
        given = [("--reduce", spec) for spec in self.reductions] + [
            ("--profile", self.profile), ("--frames", str(self.frames) if self.frames > 1 else None), ("--image-size", size),
            ("--clip-model", self.clip), ("--quantizer", self.quantizer), ("--calibration", self.calibration),
            ("--kv", self.kv), ("--islands", self.islands),
        ]  # fmt: skip
        return [self.checkpoint, *(word for name, value in given if value is not None for word in (name, value))]

    def loaded_profile(self) -> Profile:
        """Raises as `_schema.load`. A profile of the user's own is read from the output folder, once there is one."""
        profile = _schema.load(self._profile_file if _schema.is_path(self.profile) else self.profile)
        profile = profile if self.quantizer is None else _schema.with_quantizer(profile, self.quantizer)
        profile = profile if self.kv is None else _schema.with_kv(profile, self.kv)
        return profile if self.islands is None else _schema.with_islands(profile, self.islands)

    @property
    def _profile_file(self) -> Path:
        path = Path(self.profile)
        return path if self.folder is None else self.folder / path.name

    def save(self, work: Workspace) -> None:
        """job.json, and the profile if it is a file of the user's."""
        said = {name: value for name, value in asdict(self).items() if name != "folder"}
        if _schema.is_path(self.profile):
            work.write(self._profile_file.name, self._profile_file.read_text(encoding="utf-8"))
        work.write(JOB, json.dumps(said, indent=1) + "\n")

    @classmethod
    def read(cls, work: Workspace) -> Job:
        raw = work.read_json(JOB, "Run `edgetrim export` first.")
        try:
            return replace(typed(cls, raw), folder=work.folder)
        except ValueError as e:
            raise ExportError(f"{work.folder / JOB} is damaged ({e}). Run `edgetrim export` again.") from e
