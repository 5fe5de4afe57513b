"""Budgets: `latency=40ms`, `ttft=20`, `memory=3000MiB`, `quality_drop=2points`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from exporter.errors import EnvironmentMismatch, ExportError, GateError, LatencyError, UsageError, nearest


@dataclass(frozen=True)
class Kind:
    """unit: of the figure. words: what it is of. error: what it is if nothing is within it."""

    unit: str
    words: str
    error: type[ExportError]


KINDS = {
    "latency": Kind("ms", "a whole answer", LatencyError),
    "ttft": Kind("ms", "the first token", LatencyError),
    "memory": Kind("MiB", "memory at the profile's limits", EnvironmentMismatch),
    "quality_drop": Kind("points", "right answers lost, in percent of all", GateError),
}


@dataclass(frozen=True)
class Budget:
    """At most `most`, in the unit of its kind."""

    name: str
    most: float

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def words(self) -> str:
        return f"{self.name} ≤ {self.most:g} {self.kind.unit}"

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Raises UsageError."""
        name, _, rest = (part.strip() for part in text.partition("="))
        if name not in KINDS:
            raise UsageError(f"There is no budget '{name}'. {nearest(name, KINDS)}")
        unit = KINDS[name].unit
        found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*(?:{unit})?", rest, re.IGNORECASE)
        if found is None:
            raise UsageError(f"The budget '{text}' has no figure in {unit}; write it as in {name}=20{unit}.")
        return cls(name, float(found[1]))


def parse_all(texts: tuple[str, ...]) -> tuple[Budget, ...]:
    """Budgets, each named once. Raises UsageError."""
    found = tuple(Budget.parse(text) for text in texts)
    for budget in found:
        if [b.name for b in found].count(budget.name) > 1:
            raise UsageError(f"The budget '{budget.name}' is given twice.")
    return found
