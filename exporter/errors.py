"""Errors the user sees: what is wrong, what was found, what was expected, what to do.

The library raises these; only `exporter.cli` prints them and exits with their `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExportError(Exception):
    """Something the user has to know about. `exit_code` is what the command line exits with."""

    exit_code = 1


class UsageError(ExportError):
    """What was asked for cannot be: an unknown name, a bad knob, a combination that does not fit."""

    exit_code = 2


class CheckpointError(ExportError):
    """The checkpoint is incomplete, damaged, or not what its config says."""


class GateError(ExportError):
    """A fidelity or quality gate did not pass."""

    exit_code = 3


class LatencyError(ExportError):
    """A latency gate did not pass."""

    exit_code = 4


class EnvironmentMismatch(ExportError):
    """This machine lacks what the target needs: a package, a GPU, memory, disk."""

    exit_code = 5


class VerificationError(ExportError):
    """A bundle is not what its manifest says: a hash, a missing or an extra file."""

    exit_code = 6


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the nearest known name, then all of them.

    >>> nearest("vizionzip", ["fastv", "visionzip"])
    "Did you mean 'visionzip'? Known: fastv, visionzip."
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(names) or 'none'}."
