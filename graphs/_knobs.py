"""Knob values: what a field's annotation accepts, in words, and as text in `NAME:knob=value` specs.

Annotations used by methods: int, float, bool, str, None, Literal, tuple[int, ...] and unions of them; another
reduction where a method wraps one.
"""

from __future__ import annotations

import math
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

TRUE, FALSE = ("on", "true"), ("off", "false")


def accepts(hint: Any, value: object) -> bool:
    """Whether `value` is what the annotation says. A bool is no number here; a whole number is a float."""
    if _is_union(hint):
        return any(accepts(h, value) for h in get_args(hint))
    if get_origin(hint) is Literal:
        return any(type(value) is type(a) and value == a for a in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and bool(value) and all(accepts(int, v) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def expected(hint: Any) -> str:
    """The annotation in words.

    >>> expected(Literal["auto", "cls"] | int | None)
    'auto, cls, a whole number or none'
    """
    words = _words(hint)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _words(hint: Any) -> list[str]:
    if _is_union(hint):
        return [w for h in get_args(hint) for w in _words(h)]
    if get_origin(hint) is Literal:
        return [str(a) for a in get_args(hint)]
    if get_origin(hint) is tuple:
        return ["whole numbers joined by +"]
    known = {
        int: "a whole number",
        float: "a number",
        bool: "on or off",
        str: "a word",
        types.NoneType: "none",
    }
    return [known.get(hint, "a reduction")]


def read(hint: Any, text: str) -> object:
    """The value that `text` spells, of the first type in the annotation that fits, else ValueError."""
    if _is_union(hint):
        for h in get_args(hint):
            try:
                return read(h, text)
            except ValueError:
                continue
        raise ValueError(text)
    if get_origin(hint) is Literal:
        found = [a for a in get_args(hint) if str(a) == text]
        return found[0] if found else _refuse(text)
    if get_origin(hint) is tuple:
        return tuple(int(read(int, part)) for part in text.split("+"))  # type: ignore[call-overload]
    if hint is types.NoneType:
        return None if text == "none" else _refuse(text)
    if hint is bool:
        return True if text in TRUE else False if text in FALSE else _refuse(text)
    if hint is int:
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else _refuse(text)
    if hint is float:
        value = float(text)
        return value if math.isfinite(value) else _refuse(text)
    return text


def write(value: object) -> str:
    """The text that `read` turns into `value` again."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return TRUE[0] if value else FALSE[0]
    if isinstance(value, tuple):
        return "+".join(write(v) for v in value)
    return str(value)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _refuse(text: str) -> Any:
    raise ValueError(text)
