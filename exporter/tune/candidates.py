"""Candidates: methods × keep ratios × profiles, with the controls of every count they meet, and the model unreduced."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from exporter.errors import ExportError, UsageError, nearest
from exporter.stages.curves import CONTROLS, fill
from graphs import _spec
from graphs._contract import ReductionError

if TYPE_CHECKING:
    from exporter.job import Job
    from exporter.plan import Plan

PLACEHOLDERS = frozenset(("ratio", "keep", "total", "frames"))
"""What `curves.fill` fills in."""


@dataclass(frozen=True)
class Candidate:
    """reductions: specs, as of `Job`. profile: a name or a path. role: only a method is searched for; the others are what it is
    compared with."""

    reductions: tuple[str, ...]
    profile: str
    role: Literal["method", "control", "unreduced"] = "method"

    @property
    def spec(self) -> str:
        return " + ".join(self.reductions) or "unreduced"

    @property
    def key(self) -> str:
        """Its name in a journal."""
        return f"{self.profile} {self.spec}"


@dataclass(frozen=True)
class LeftOut:
    """A candidate that does not fit, and why."""

    spec: str
    profile: str
    reason: str


def templates(methods: Sequence[str]) -> list[str]:
    """Spec templates, see `curves.fill`, of what the user wrote: names, with commas between them, or one template each, which has a
    colon. Nothing: all methods.

    Raises:
        UsageError: there is no such method, no such placeholder, or nothing to search for.
    """
    found: list[str] = []
    for text in methods or (",".join(_spec.names()),):
        if ":" in text:
            found.append(text)
            continue
        for name in filter(None, (part.strip() for part in text.split(","))):
            if name not in _spec.names():
                raise UsageError(f"Unknown reduction '{name}'. {nearest(name, _spec.names())}")
            found.append(_spec.sweep(name))
    for template in found:
        if unknown := sorted(set(re.findall(r"\{(.*?)\}", template)) - PLACEHOLDERS):
            raise UsageError(
                f"'{template}' has the placeholder {{{unknown[0]}}}. Known: {', '.join(f'{{{p}}}' for p in sorted(PLACEHOLDERS))}."
            )
    searched = [t for t in dict.fromkeys(found) if t.partition(":")[0] not in CONTROLS]
    if not searched:
        raise UsageError(
            f"`--methods` names nothing to search for. {' and '.join(CONTROLS)} take part by themselves, as controls. `edgetrim list "
            "reductions` shows the methods."
        )
    return searched


def candidates(
    job: Job,
    methods: Sequence[str],
    keep_ratios: Sequence[float],
    profiles: Sequence[str],
    log: Callable[[str], None] = lambda text: None,
) -> tuple[list[Candidate], list[LeftOut]]:
    """All there are, in order, and what does not fit the model or the profile, with the reason.

    Args:
        job: its reductions and profile do not matter.
    """
    found: list[Candidate] = []
    left: list[LeftOut] = []
    for profile in profiles:
        bare = replace(job, profile=profile, reductions=())
        site = bare.plan().geometry.tower
        found.append(Candidate((), profile, "unreduced"))
        controls: list[Candidate] = []
        for template in templates(methods):
            for ratio in keep_ratios:
                spec = fill(template, ratio, site.tokens, site.frames)
                if spec is None:
                    left.append(LeftOut(template, profile, f"{ratio:g} of {site.frames} frames is no whole number"))
                    continue
                candidate = Candidate(tuple(spec.split(" + ")), profile)
                if candidate in found or any((c.spec, c.profile) == (spec, profile) for c in left):
                    continue  # of a method without a ratio
                log(spec)
                try:
                    plan = replace(bare, reductions=candidate.reductions).plan()
                    beside = _controls(plan)
                except (ExportError, ReductionError) as e:
                    left.append(LeftOut(spec, profile, str(e)))
                    continue
                found.append(candidate)
                controls += [Candidate((spec,), profile, "control") for spec in beside]
        found += dict.fromkeys(controls)
    return found, left


def _controls(plan: Plan) -> list[str]:
    """Random and uniform selection of as many tokens."""
    from exporter.stages import validate

    return [_spec.format(control.steps[-1].method) for _, control in validate.controls(plan)]
