"""The TensorRT module that is installed: loaded late, checked, and what it logs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

from exporter.errors import EnvironmentMismatch

MINIMUM = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 0)}
MARKS = {"INTERNAL_ERROR": "F", "ERROR": "E", "WARNING": "W", "INFO": "I"}
"""Severities that are told; VERBOSE is not (25,000 lines for a 24-layer decoder)."""


def load(name: str) -> Any:
    """The module. It may be installed and still not load: a library it links to is missing."""
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError) as e:
        raise EnvironmentMismatch(f"Python module `{name}` does not load here: {e}") from e
    if version(trt.__version__) < MINIMUM[name]:
        least = ".".join(map(str, MINIMUM[name]))
        raise EnvironmentMismatch(
            f"{name} {trt.__version__} is too old; {least} or newer is needed (JetPack 6.2 has 10.3)."
        )
    return trt


def version(text: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def logger(trt: Any, tell: Callable[[str, str], None]) -> Any:
    """A logger that calls `tell` with severity and message, in one line."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in MARKS:
                tell(severity.name, " ".join(text.split()))

    return Logger()
