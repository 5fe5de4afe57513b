"""docs/profiles.md explains every key, and no key that is gone."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from profiles import _schema

PAGE = Path(__file__).resolve().parents[2] / "docs" / "profiles.md"


def test_every_key_is_explained() -> None:
    sections = {"stack", "precision", "limits", "gates"}
    alone = {"device", "power_mode", "description"}
    assert {f.name for f in fields(_schema.Profile)} - {"name"} == sections | alone
    keys = alone | {f.name for f in fields(_schema.Device)}
    for kind in (_schema.Stack, _schema.Precision, _schema.Limits, _schema.Memory, _schema.Mode, _schema.Gates):
        keys |= {f.name for f in fields(kind)}
    keys -= {"memory", "modes"}
    sections |= {"device", "device.memory", "device.modes.NAME"}
    text = PAGE.read_text()
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, re.M)
    assert {key.strip("`") for row in rows for key in row.split(", ")} == keys
    assert set(re.findall(r"^\| \*\*`\[([\w.]+)\]`\*\* \|", text, re.M)) == sections
