"""The knob `score` of methods that rank tokens by attention: from CLS, or, in towers without one, from everybody."""

from __future__ import annotations

from typing import Literal

from graphs._contract import Site

Score = Literal["auto", "cls", "column"]
"""Where a token's attention comes from: CLS, all tokens (column mean), or CLS where there is one."""


def resolved(score: Score, site: Site) -> Score:
    """ "auto" decided for this site; what was given stays."""
    if score != "auto":
        return score
    return "cls" if "cls_attention" in site.signals else "column"


def signal(score: Score, block: int | None = None) -> str:
    """The signal that holds the score at a tower block, None: at the features'. "auto": what papers ask for, CLS."""
    name = "column_attention" if score == "column" else "cls_attention"
    return name if block is None else f"{name}@{block}"
