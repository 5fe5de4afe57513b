"""The letter that the answer chooses: "B", "(b)", "B. a cat", "The answer is B" are B; so is the right answer's."""

from __future__ import annotations

import re
from collections.abc import Sequence

FORMS = (
    r"^\W*([A-Za-z])\W*$",  # alone
    r"^\W*([A-Za-z])\s*[).:,]",  # "B. a cat"
    r"(?i:\b(?:answer|option|choice)\b(?:\s+is)?)\W*([A-Za-z])\b",
    r"\(([A-Za-z])\)",
    r"^\W*([B-HJ-Z])\b",  # "B because…"; A and I are words
)


def choice(answer: str, expected: Sequence[str]) -> float:
    given = letter(answer)
    return float(given is not None and given in {letter(e) for e in expected})


def letter(text: str) -> str | None:
    for form in FORMS:
        if found := re.search(form, text.strip()):
            return found[1].upper()
    return None


METRIC = choice
