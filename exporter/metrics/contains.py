"""A right answer's words stand in the answer, in a row: "a cat" in "There is a cat on it.", not in "a catalogue"."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.metrics._contract import words


def contains(answer: str, expected: Sequence[str]) -> float:
    given = words(answer)
    return float(any(_in_a_row(words(e), given) for e in expected))


def _in_a_row(part: Sequence[str], whole: Sequence[str]) -> bool:
    return bool(part) and any(list(whole[i : i + len(part)]) == list(part) for i in range(len(whole) - len(part) + 1))


METRIC = contains
