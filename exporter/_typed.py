"""Data of others, JSON as it was read, to our dataclasses: what does not fit is told by its place, and nothing else comes of it."""

from __future__ import annotations

import base64
import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
LARGEST = 64 * 2**20
"""Bytes of a JSON file; what we write ourselves is far below."""


def read_json(path: Path, largest: int = LARGEST) -> Any:
    """A JSON file in UTF-8.

    Raises:
        OSError: it cannot be read. ValueError: it is no JSON, larger than `largest` bytes, or nested too deeply.
    """
    with path.open("rb") as file:
        raw = file.read(largest + 1)
    if len(raw) > largest:
        raise ValueError(f"it is larger than {largest // 2**20} MiB")
    return parsed(raw)


def parsed(text: str | bytes) -> Any:
    """JSON. Raises ValueError: it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def typed(kind: type[T], raw: Any) -> T:
    """A value of this type: a dataclass from a dict, lists and tuples from lists, bytes from base64, other things as they are.

    Fields without a default must be there, and no others.

    Raises:
        ValueError: something has another type; says where, "text.eos[0] is a str, expected int".
    """
    return cast(T, _value(kind, raw, ""))


def _value(kind: Any, raw: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return raw
    if origin in (Union, types.UnionType):
        return _one_of(inner, raw, where)
    if origin is Literal:
        return raw if raw in inner and isinstance(raw, str) else _refuse(kind, raw, where)
    if origin is list:
        return [_value(inner[0], v, f"{where}[{i}]") for i, v in enumerate(_is(list, raw, where))]
    if origin is tuple:
        each = [inner[0]] * len(_is(list, raw, where)) if inner[-1] is Ellipsis else list(inner)
        if len(each) != len(_is(list, raw, where)):
            raise ValueError(f"{where or 'it'} has {len(raw)} entries, expected {len(each)}")
        return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(each, raw, strict=True)))
    if origin in (dict, Mapping):
        return {k: _value(inner[1], v, f"{where}.{k}") for k, v in _is(dict, raw, where).items()}
    if is_dataclass(kind):
        return _dataclass(cast(type, kind), _is(dict, raw, where), where)
    if kind is bytes:
        return base64.b64decode(_is(str, raw, where), validate=True)
    if kind is float and isinstance(raw, int):
        return _is(int, raw, where)
    return _is(kind, raw, where)


def _one_of(kinds: tuple[Any, ...], raw: Any, where: str) -> Any:
    for kind in kinds[:-1]:
        try:
            return _value(kind, raw, where)
        except ValueError:
            continue
    return _value(kinds[-1], raw, where)


def _dataclass(kind: type, raw: Mapping[str, Any], where: str) -> Any:
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
    for name in raw:
        if name not in known:
            raise ValueError(f"{where or 'it'} has an unknown entry '{name}'")
    for name, field in known.items():
        if name not in raw and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where or 'it'} has no '{name}'")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}".lstrip(".")) for name, value in raw.items()})


def _is(kind: Any, raw: Any, where: str) -> Any:
    """Whole numbers are no bools here, and fit 64 bits."""
    if not isinstance(raw, kind) or (kind is int and (isinstance(raw, bool) or not -(2**63) <= raw < 2**63)):
        return _refuse(kind, raw, where)
    return raw


def _refuse(kind: Any, raw: Any, where: str) -> Any:
    name = getattr(kind, "__name__", str(kind)) if not get_args(kind) else str(kind).removeprefix("typing.")
    found = repr(raw)
    raise ValueError(f"{where or 'it'} is {found if len(found) <= 40 else found[:37] + '…'}, expected {name}")
