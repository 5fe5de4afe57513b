"""`edgetrim list`: everything discovered is there, as a table and as data."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

import exporter.backends
import exporter.families
from exporter import _discover
from graphs import _spec
from profiles import _schema

Run = Callable[..., tuple[int, str, str]]


def expected() -> dict[str, list[str]]:
    return {
        "reductions": _spec.names(),
        "families": _discover.names(exporter.families),
        "profiles": _schema.names(),
        "backends": _discover.names(exporter.backends),
    }


def test_json_holds_everything(edgetrim: Run) -> None:
    code, out, err = edgetrim("list", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert {kind: [item["name"] for item in items] for kind, items in found.items()} == expected()


@pytest.mark.parametrize("kind", expected())
def test_a_table_names_everything(edgetrim: Run, kind: str) -> None:
    code, out, err = edgetrim("list", kind)
    assert (code, err) == (0, "")
    first = {line.split()[0] for line in out.splitlines() if line.split()}
    assert set(expected()[kind]) <= first


def test_data_of_a_reduction(edgetrim: Run) -> None:
    items = json.loads(edgetrim("list", "reductions", "--json")[1])["reductions"]
    tome = next(i for i in items if i["name"] == "tome")
    assert tome["place"] == "in_tower"
    assert {"name": "keep", "default": "none"}.items() <= tome["knobs"][1].items()
    assert tome["needs"] == ["hidden", "keys"]
    assert "2210.09461" in tome["paper"]


def test_data_of_a_profile(edgetrim: Run) -> None:
    items = json.loads(edgetrim("list", "profiles", "--json")[1])["profiles"]
    orin = next(i for i in items if i["name"] == "orin_nano_8gb_int4")
    assert orin["stack"]["compute_capabilities"] == [87]
    assert orin["memory"]["largest_block_mib"] == 950


def test_the_table_of_profiles(edgetrim: Run) -> None:
    lines = edgetrim("list", "profiles")[1].splitlines()
    assert lines[0] == "Profiles (--profile NAME)"
    assert lines[2].split() == ["name", "device", "stack", "precision", "description"]
    row = next(line for line in lines if line.startswith(" cpu_int4 "))
    assert row.split(maxsplit=6)[:6] == ["cpu_int4", "CPU", "ort", "int4", "weights,", "fp32"]


def test_an_unknown_kind(edgetrim: Run) -> None:
    assert edgetrim("list", "profile") == (
        2,
        "",
        "Error: Unknown kind 'profile'. Did you mean 'profiles'? Known: backends, families, profiles, reductions.\n",
    )
