"""Discovery by file name: a file in the right folder *is* the name users type.

A leading underscore means shared code, not discovered. There is no registry to edit.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from exporter.errors import UsageError, nearest


def names(package: ModuleType) -> list[str]:
    """Names offered by a package: its modules without a leading underscore, sorted. Imports none of them."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load(package: ModuleType, kind: str, name: str) -> ModuleType:
    """Import the module called `name` from `package`.

    Raises:
        UsageError: no such file; offers the nearest name. `kind` is the word for it ("reduction", "backend").
    """
    known = names(package)
    if name not in known:
        raise UsageError(f"Unknown {kind} '{name}'. {nearest(name, known)}")
    return importlib.import_module(f"{package.__name__}.{name}")
