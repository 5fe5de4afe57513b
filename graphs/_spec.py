"""Reduction specs, `NAME[:knob=value,…]`: text to method and back, and what there is to write.

A method that wraps another one is written in front of it: `NAME[:knob=value,…]+SPEC`.

A method is a module of this package without a leading underscore; its name is the module's, its object
`METHOD`. Optional module constants: `EXAMPLES`, specs worth showing, which the contract tests run too, and `SWEEP`,
see `sweep`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Collection, Iterable
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from typing import get_type_hints

import graphs
from graphs._contract import Reduction, ReductionError
from graphs._knobs import expected, read, write


@dataclass(frozen=True)
class Knob:
    """One knob: its default as one writes it, "required" if there is none, and what it takes in words."""

    name: str
    default: str
    takes: str


@dataclass(frozen=True)
class Description:
    """What `describe` tells about a method. `needs`: signals with the knobs at their defaults. `sweep`: see there."""

    name: str
    summary: str
    place: str
    tier: str
    paper: str
    knobs: tuple[Knob, ...]
    needs: tuple[str, ...]
    examples: tuple[str, ...]
    doc: str
    sweep: str


def names() -> list[str]:
    """Names of all methods, sorted. Imports none of them."""
    return sorted(m.name for m in pkgutil.iter_modules(graphs.__path__) if not m.name.startswith("_"))


@cache
def load(name: str) -> type[Reduction]:
    """The method called `name`.

    Raises:
        ReductionError: there is none; offers the nearest.
    """
    if name not in names():
        raise ReductionError(f"there is no reduction '{name}'. {_nearest(name, names())}")
    method: type[Reduction] = importlib.import_module(f"graphs.{name}").METHOD
    return method


def parse(text: str) -> Reduction:
    """The (unfitted) method that `text` spells.

    >>> parse("visionzip:keep=64,order=raster").order
    'raster'

    Raises:
        ReductionError: unknown name or knob, a value of the wrong type, a knob given twice, or bad syntax.
    """
    method = load(re.split("[:+]", text, maxsplit=1)[0].strip())
    wrapped = _wrapped(method)
    head, _, inner = text.partition("+") if wrapped else (text, "", "")
    name, colon, rest = (part.strip() for part in head.partition(":"))
    if wrapped and not inner.strip():
        raise ReductionError(f"{name} wraps another reduction; write {name}+NAME or {name}:knob=value,…+NAME:…")
    if colon and not rest:
        raise ReductionError(f"'{text}' ends after the colon; write NAME or NAME:knob=value,…")
    try:
        values: dict[str, object] = {wrapped: parse(inner.strip())} if wrapped else {}
    except RecursionError:
        raise ReductionError(f"too many reductions wrap one another in '{text[:40]}…'") from None
    values |= knobs(method, name, rest, {wrapped} if wrapped else ())
    return method(**values)


def knobs(kind: type, name: str, text: str, without: Collection[str] = ()) -> dict[str, object]:
    """The values in `knob=value,…`, for the fields of a dataclass.

    Args:
        name: what it is called where something does not fit. without: fields that are no knobs.
    Raises:
        ReductionError: an unknown knob or one given twice, a value of the wrong type, a required one missing, or bad syntax.
    """
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind) if f.name not in without}
    values: dict[str, object] = {}
    for item in text.split(",") if text else ():
        knob, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not knob or not value:
            raise ReductionError(f"'{item.strip()}' in '{name}:{text}' is not of the form knob=value")
        if knob not in known:
            listed = ", ".join(f"{k}={_default(f)}" for k, f in known.items())
            raise ReductionError(f"{name} has no knob `{knob}`. {_nearest(knob, known, None)}Knobs: {listed}.")
        if knob in values:
            raise ReductionError(f"`{knob}` is given twice in '{name}:{text}'")
        try:
            values[knob] = read(hints[knob], value)
        except ValueError:
            raise ReductionError(f"`{knob}` of {name} takes {expected(hints[knob])}; found '{value}'") from None
    missing = [k for k, f in known.items() if _default(f) == "required" and k not in values]
    if missing:
        raise ReductionError(f"{name} needs {', '.join(f'`{k}`' for k in missing)}, as in {name}:{missing[0]}=…")
    return values


def format(reduction: Reduction) -> str:
    """The spec of a method, knobs at their defaults left out: `parse(format(x)) == x`."""
    wrapped = _wrapped(type(reduction))
    given = [
        f"{f.name}={write(getattr(reduction, f.name))}"
        for f in fields(reduction)
        if f.name != wrapped and (f.default is MISSING or getattr(reduction, f.name) != f.default)
    ]
    own = f"{name(reduction)}:{','.join(given)}" if given else name(reduction)
    return f"{own}+{format(getattr(reduction, wrapped))}" if wrapped else own


def title(reduction: Reduction) -> str:
    """The method's name, and that of what it wraps: "restore+divprune"."""
    wrapped = _wrapped(type(reduction))
    return f"{name(reduction)}+{title(getattr(reduction, wrapped))}" if wrapped else name(reduction)


def name(reduction: Reduction) -> str:
    """The method's own name, whatever it wraps."""
    return type(reduction).__module__.rpartition(".")[2]


@cache
def _wrapped(method: type[Reduction]) -> str | None:
    """The field that holds another reduction."""
    hints = get_type_hints(method)
    return next(
        (f.name for f in fields(method) if isinstance(hints[f.name], type) and issubclass(hints[f.name], Reduction)),
        None,
    )


def examples(name: str) -> tuple[str, ...]:
    """Specs the method's module offers as examples."""
    load(name)
    return tuple(getattr(importlib.import_module(f"graphs.{name}"), "EXAMPLES", ()))


def sweep(name: str) -> str:
    """The method at any keep ratio: a spec with `{ratio}` in it, all else at its default.

    >>> sweep("visionzip")
    'visionzip:keep_ratio={ratio}'
    """
    load(name)
    return str(getattr(importlib.import_module(f"graphs.{name}"), "SWEEP", f"{name}:keep_ratio={{ratio}}"))


def describe(name: str) -> Description:
    """All there is to say about a method without a model. Raises ReductionError like `load`."""
    method = load(name)
    hints = get_type_hints(method)
    doc = importlib.import_module(f"graphs.{name}").__doc__ or ""
    required = any(_default(f) == "required" for f in fields(method))
    return Description(
        name=name,
        summary=doc.strip().partition("\n")[0],
        place=method.place,
        tier=method.tier,
        paper=method.paper,
        knobs=tuple(Knob(f.name, _default(f), expected(hints[f.name])) for f in fields(method)),
        needs=() if required else method().needs,
        examples=examples(name),
        doc=doc,
        sweep=sweep(name),
    )


def _default(field: Field[object]) -> str:
    return "required" if field.default is MISSING else write(field.default)


def _nearest(name: str, known: Iterable[str], listed: str | None = "Known: ") -> str:
    """Hint for an unknown name. `listed` introduces all known names; None leaves them out."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return hint if listed is None else f"{hint}{listed}{', '.join(names) or 'none'}."
