"""The question as one vector, and the knob that says in which space it meets the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from graphs._contract import Signals, Site

if TYPE_CHECKING:
    from torch import Tensor

Meeting = Literal["auto", "clip", "llm"]
"""Where tokens and question are compared: the space a CLIP tower shares with its text, the language model's, or clip
where there is one."""


def resolved(meeting: Meeting, site: Site) -> Meeting:
    """ "auto" decided for this site; what was given stays."""
    if meeting != "auto":
        return meeting
    return "clip" if {"aligned", "aligned_text"} <= site.signals else "llm"


def needs(meeting: Meeting) -> tuple[str, ...]:
    """The signals read besides `hidden`. "auto": what papers ask for, CLIP's."""
    return ("text", "text_mask") if meeting == "llm" else ("aligned", "aligned_text")


def mean_text(signals: Signals) -> Tensor:
    """float32 [batch, dim]: the mean of the prompt's text tokens, padding left out."""
    mask = signals["text_mask"].float().unsqueeze(-1)
    return (signals["text"].float() * mask).sum(1) / mask.sum(1).clamp(min=1)
