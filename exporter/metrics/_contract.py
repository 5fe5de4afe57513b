"""What a metric is: a function of the answer and the right ones, which is the module's `METRIC`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from exporter import _discover, metrics
from exporter.errors import UsageError, nearest

Metric = Callable[[str, Sequence[str]], float]
"""(answer, right answers, at least one) → 0..1, the best over the right ones."""
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def load(name: str) -> Metric:
    """Raises UsageError for an unknown name."""
    metric: Metric = _discover.load(metrics, "metric", name).METRIC
    return metric


def names() -> list[str]:
    return _discover.names(metrics)


def check(name: str, expected: Sequence[str]) -> None:
    """A right answer has to be right, else no answer ever is.

    Raises:
        UsageError: an unknown metric, or an answer that it cannot score.
    """
    if name not in names():
        raise UsageError(f"unknown metric '{name}'. {nearest(name, names())}")
    metric = load(name)
    for answer in expected:
        if metric(answer, [answer]) != 1.0:
            raise UsageError(f"the metric '{name}' cannot score the right answer '{answer}'.")


def words(text: str) -> list[str]:
    """Without case and punctuation; a point or comma inside a number stays."""
    return re.findall(r"[^\W_]+(?:[.,'’][^\W_]+)*", text.casefold())
