"""docs/profiles.md explains every key, and no key that is gone."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from profiles import _schema

PAGE = Path(__file__).resolve().parents[2] / "docs" / "profiles.md"


def test_every_key_is_explained() -> None:
    sections = {"stack", "precision", "limits", "memory", "gates"}
    keys = {"device", "description"}
    for kind in (_schema.Stack, _schema.Precision, _schema.Limits, _schema.Memory, _schema.Gates):
        keys |= {f.name for f in fields(kind)}
    assert {f.name for f in fields(_schema.Profile)} - {"name"} == sections | {"device", "description"}
    text = PAGE.read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == keys
    assert set(re.findall(r"^\| \*\*`\[(\w+)\]`\*\* \|", text, re.M)) == sections
