"""The last number of the answer is that of a right one, however it is written: "1,200", "1200.0", "1.2e3"; "two" is 2.

A unit behind the number, a currency before it and a percent sign are not compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from exporter.metrics._contract import NUMBERS

NUMBER = re.compile(
    rf"[-−+]?(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:e[-+]?\d{{1,3}})?|[-−+]?\.\d+|\b(?:{'|'.join(NUMBERS)})\b"
)


def numeric(answer: str, expected: Sequence[str]) -> float:
    given = value(answer)
    return float(given is not None and any(_same(given, value(e)) for e in expected))


def value(text: str) -> float | None:
    """The last number in a text; None if there is none. A hyphen behind a letter or digit is no minus."""
    found = list(NUMBER.finditer(text.casefold()))
    if not found:
        return None
    written, start = found[-1][0], found[-1].start()
    if written in NUMBERS:
        return float(NUMBERS.index(written))
    if written[0] in "-−+" and start > 0 and text[start - 1].isalnum():
        written = written[1:]
    return float(written.replace(",", "").replace("−", "-"))


def _same(a: float, b: float | None) -> bool:
    return b is not None and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


METRIC = numeric
