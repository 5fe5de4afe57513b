"""Strategies that damage what was whole: JSON values, TOML and JSON texts, bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

OUTSIDE = "outside"
"""A folder beside the one that is read; nothing in it may be opened."""

Path_ = tuple[Any, ...]

NASTY = st.sampled_from(
    [
        None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64 - 8, -(2**70), 10**400, 0.5, 1e308, float("inf"), float("nan"), "", "0", "a", "x" * 300,
        "x" * 5000, "\0", "\ud800", "\x1b[2J", ".", "..", "../outside/secret", "/etc/hostname", "a/../../outside/secret", "link/secret",
        "C:\\secret", "~", [], {}, [[]], [{}], {"a": {}}, {"": None}, [None], [0] * 50, "{", "%s{0}", "🤷",
    ]
)  # fmt: skip
JUNK = NASTY | st.integers() | st.floats() | st.text(max_size=6) | st.lists(NASTY, max_size=3)


def places(value: Any, here: Path_ = ()) -> Iterator[Path_]:
    """The place of everything in a JSON value, itself included."""
    yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield from places(below, (*here, key))


@st.composite
def damaged(draw: st.DrawFn, value: Any) -> Any:
    """The value with one to three things replaced, removed, renamed, repeated or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(value))
        place = draw(st.sampled_from(known))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                value = draw(JUNK)
            continue
        holder = value
        for key in place[:-1]:
            holder = holder[key]
        last, how = place[-1], draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "move"]))
        if how == "remove":
            del holder[last]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=4) | st.sampled_from(["../outside/secret", "link/secret", ""]))] = holder.pop(
                last
            )
        elif how == "move":
            other = value
            for key in draw(st.sampled_from(known)):
                try:
                    other = other[key]
                except (KeyError, IndexError, TypeError):
                    break
            holder[last] = copy.deepcopy(other)
        else:
            holder[last] = draw(JUNK)
    return value


def text_of(value: Any) -> bytes:
    return json.dumps(value).encode()


def json_bytes(value: Any) -> st.SearchStrategy[bytes]:
    """Files that began as this value."""
    return damaged(value).map(text_of) | damaged_bytes(text_of(value)) | st.sampled_from(HOPELESS)


HOPELESS = [
    b"", b"\0", b"null", b"[]", b"{}", b"0", b'""', b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"1e999", b"NaN", b'"\\ud800"',
]  # fmt: skip


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes cut short, overwritten, repeated or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at, size = draw(st.integers(0, len(data))), draw(st.integers(1, 16))
        how = draw(st.sampled_from(["cut", "write", "write", "insert", "remove", "repeat"]))
        if how == "cut":
            del data[at:]
        elif how == "write":
            data[at : at + size] = draw(st.binary(min_size=1, max_size=size))
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=size) | st.just(b"\xff" * 64))
        elif how == "remove":
            del data[at : at + size]
        else:
            data[at:at] = data[at : at + size]
    return bytes(data)
