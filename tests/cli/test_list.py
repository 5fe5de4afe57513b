"""`edgetrim list`: everything discovered is there, as a table and as data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import exporter.backends
import exporter.families
import plugins
from exporter import _discover
from graphs import _spec
from profiles import _schema
from tests.families import tiny

Run = Callable[..., tuple[int, str, str]]


def expected() -> dict[str, list[str]]:
    return {
        "reductions": _spec.names(),
        "families": _discover.names(exporter.families),
        "profiles": _schema.names(),
        "backends": _discover.names(exporter.backends),
        "plugins": _discover.names(plugins),
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


def test_reductions_for_a_model(edgetrim: Run) -> None:
    found = json.loads(edgetrim("list", "reductions", "--for", "embedded", "--json")[1])
    assert found["family"] == "llava"
    assert [r["name"] for r in found["reductions"]] == _spec.names()
    by_name = {r["name"]: r for r in found["reductions"]}
    assert by_name["visionzip"] == {
        "name": "visionzip", "fits": True, "image": True, "clip": True, "spec": "visionzip:keep_ratio=0.5", "why_not": None,
    }  # fmt: skip
    assert (by_name["dtd"]["image"], by_name["dtd"]["clip"]) == (False, True)
    assert "at least 2 frames; found 1" in by_name["dtd"]["why_not"]


def test_reductions_for_a_model_without_a_class_token(edgetrim: Run, tmp_path: Path) -> None:
    tiny.qwen2_5_vl(tmp_path)
    code, out, _ = edgetrim("list", "--for", str(tmp_path))
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(" ")}
    assert rows["lftr"].split()[1] == "no"
    assert "it needs `cls`, but this model offers only" in rows["lftr"]
    assert "its 2×2 merger needs the complete grid" in rows["tome"]
    assert rows["visionzip"].split()[1:4] == ["yes", "image,", "clip"]


def test_for_goes_with_reductions(edgetrim: Run) -> None:
    code, _, err = edgetrim("list", "profiles", "--for", "embedded")
    assert (code, err) == (2, "Error: --for goes with `reductions`: edgetrim list reductions --for CHECKPOINT\n")


def test_data_of_a_profile(edgetrim: Run) -> None:
    items = json.loads(edgetrim("list", "profiles", "--json")[1])["profiles"]
    orin = next(i for i in items if i["name"] == "orin_nano_8gb_int4")
    assert orin["stack"]["compute_capabilities"] == [87]
    assert orin["device"]["memory"]["largest_block_mib"] == 950


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
        "Error: Unknown kind 'profile'. Did you mean 'profiles'? Known: backends, families, plugins, profiles, reductions.\n",
    )
