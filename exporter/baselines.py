"""Latency baselines: what a bundle took on a device, session by session, one JSON file per set of equal conditions.

    baselines/<profile>/<device>-<hash of the conditions>.json

A file's sessions compare with one another, as the conditions (model, settings, device, runtimes) are the same for all. A session is
one start of `edgetrim bench --save-baseline`. When the bundle changes a new generation begins: checks read the last one, the
history shows all. Files are small, meant to be committed, and only ever grow.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from exporter import __version__
from exporter._typed import parsed
from exporter.device import differences
from exporter.errors import EnvironmentMismatch, UsageError, VerificationError
from exporter.workspace import write_text

SCHEMA = 1
LARGEST = 16 * 2**20
"""Bytes of a file."""
MODEL = ("checkpoint", "reductions", "frames", "image")
"""Conditions that say which model it is; the others say how and where it ran."""


@dataclass(frozen=True)
class Spread:
    """One stage in one session. openings_ms: median of each opening's rounds. p90_ms: over all rounds. rounds: of an opening."""

    openings_ms: tuple[float, ...]
    p90_ms: float
    rounds: int


@dataclass(frozen=True)
class Session:
    """One start. state: how the device was then, see `device.state`."""

    utc: str
    edgetrim: str
    state: dict[str, float]
    stages: dict[str, Spread]

    @classmethod
    def now(cls, stages: dict[str, Spread], state: dict[str, float]) -> Session:
        return cls(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), __version__, state, stages)


@dataclass(frozen=True)
class Generation:
    """Sessions of one and the same bundle, by its hash."""

    bundle: str
    sessions: tuple[Session, ...]


@dataclass(frozen=True)
class Baseline:
    profile: str
    conditions: dict[str, str]
    generations: tuple[Generation, ...] = ()

    def path(self, folder: Path) -> Path:
        """Where it is kept: the same conditions give the same name."""
        where = next((self.conditions[k] for k in ("module", "GPU", "processor") if k in self.conditions), "device")
        slug = re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-")[:40]
        digest = hashlib.sha256(json.dumps(self.conditions, sort_keys=True).encode()).hexdigest()
        return folder / self.profile / f"{slug}-{digest[:12]}.json"

    def with_session(self, bundle: str, session: Session) -> Baseline:
        """One session more: in the last generation if that is this bundle's, else in a new one."""
        if self.generations and self.generations[-1].bundle == bundle:
            *before, last = self.generations
            return replace(self, generations=(*before, Generation(bundle, (*last.sessions, session))))
        return replace(self, generations=(*self.generations, Generation(bundle, (session,))))

    def save(self, folder: Path) -> Path:
        path = self.path(folder)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False) + "\n")
        except OSError as e:
            raise UsageError(f"Cannot write to {path}: {e.strerror}. Choose another --baselines.") from e
        return path


def load(path: Path) -> Baseline:
    """Read a baseline.

    Raises:
        UsageError: it cannot be read. VerificationError: it is not what a baseline says.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
    except OSError as e:
        raise UsageError(f"Baseline {path} cannot be read: {e.strerror}.") from e
    if len(text) > LARGEST:
        raise VerificationError(f"{path} is larger than {LARGEST // 2**20} MiB. That is not a baseline.")
    try:
        raw = parsed(text)
        schema = int(raw["schema"])
        if schema == SCHEMA:
            conditions = {str(k): str(v) for k, v in raw["conditions"].items()}
            return Baseline(str(raw["profile"]), conditions, tuple(_generation(g) for g in raw["generations"]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise VerificationError(
            f"Baseline {path} is damaged ({type(e).__name__}: {e}). Restore it, or remove it and save it anew."
        ) from e
    raise VerificationError(
        f"Baseline {path} has schema {schema}; this edgetrim reads {SCHEMA}. Use the version that wrote it."
    )


def _generation(raw: Mapping[str, Any]) -> Generation:
    return Generation(str(raw["bundle"]), tuple(_session(s) for s in raw["sessions"]))


def _session(raw: Mapping[str, Any]) -> Session:
    stages = {
        str(name): Spread(tuple(_ms(v) for v in s["openings_ms"]), _ms(s["p90_ms"]), int(s["rounds"]))
        for name, s in raw["stages"].items()
    }
    if not all(spread.openings_ms for spread in stages.values()):
        raise ValueError("a stage without a time")
    state = {str(k): float(v) for k, v in raw["state"].items()}
    return Session(str(raw["utc"]), str(raw["edgetrim"]), state, stages)


def _ms(value: Any) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value} is no time")
    return float(value)


def stored(folder: Path, profile: str) -> list[tuple[Path, Baseline]]:
    """All baselines of a profile, by name of the file."""
    return [(path, load(path)) for path in sorted((folder / profile).glob("*.json"))]


HOW = "`edgetrim bench FOLDER --save-baseline` makes one; --against OTHER_FOLDER compares two bundles without."


def of_model(folder: Path, profile: str, model: Mapping[str, str]) -> list[tuple[Path, Baseline]]:
    """The baselines of a profile that are of this model, under whatever conditions.

    Args:
        model: conditions, of which those in `MODEL` are compared.
    Raises:
        UsageError: there are none.
    """
    wanted = {k: model.get(k) for k in MODEL}
    same = [(p, b) for p, b in stored(folder, profile) if {k: b.conditions.get(k) for k in MODEL} == wanted]
    if not same:
        name = f"{wanted['checkpoint']} ({wanted['reductions']})"
        raise UsageError(f"{folder} has no baseline of {name} for profile `{profile}`. {HOW}")
    return same


def find(folder: Path, profile: str, conditions: Mapping[str, str]) -> tuple[Path, Baseline]:
    """The baseline that holds under these conditions.

    Raises:
        UsageError: there is none of this model. EnvironmentMismatch: there is one, but it is not comparable; says why.
    """
    found = of_model(folder, profile, conditions)
    path, nearest = min(found, key=lambda entry: len(differences(entry[1].conditions, conditions)))
    if changed := differences(nearest.conditions, conditions):
        raise EnvironmentMismatch(f"The baseline {path} is not comparable: {in_words(changed)}. {HOW}")
    return path, nearest


def in_words(changed: Sequence[str]) -> str:
    return ", ".join(changed[:6]) + (f" and {len(changed) - 6} more" if len(changed) > 6 else "")
