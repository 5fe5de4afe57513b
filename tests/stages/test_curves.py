"""Spec templates at a keep ratio, and pictures that show what was kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from exporter.embedded import digits
from exporter.errors import UsageError
from exporter.graphset import ImageSpec
from exporter.job import EMBEDDED, Job
from exporter.runtime import images
from exporter.stages import _task, curves
from exporter.workspace import Workspace


@pytest.mark.parametrize(
    ("template", "ratio", "spec"),
    [
        ("uniform:keep={keep}", 0.25, "uniform:keep=16"),
        ("fastv:keep={total}", 0.25, "fastv:keep=64"),
        ("random:keep_ratio={ratio}", 0.125, "random:keep_ratio=0.125"),
        ("lftr:temporal=similarity,keep_frames={frames}", 0.5, "lftr:temporal=similarity,keep_frames=2"),
        ("lftr:temporal=similarity,keep_frames={frames}", 0.125, None),
        ("uniform:keep={keep}", 0.001, "uniform:keep=1"),
    ],
)
def test_fill(template: str, ratio: float, spec: str | None) -> None:
    assert curves.fill(template, ratio, tokens=64, frames=4) == spec


def test_label() -> None:
    assert curves.label("visionzip:keep={keep} + fastv:layer=3,keep={total}") == "visionzip + fastv:layer=3"


def test_what_the_model_sees_is_the_image() -> None:
    image = digits.held_out("cell", 1)[0].frames
    spec = ImageSpec(64, 64, "exact", 64, 64, 3, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    question = _task.embedded(1, 1)[0]
    assert np.array_equal(curves.seen(images.preprocess(question.frames, spec), spec), image)


def test_measure() -> None:
    found = curves.measure(Job(EMBEDDED, (), "cpu_fp32"), ["uniform:keep={keep}"], (0.25, 0.5), per_kind=1)
    assert set(found["full"]) == {"cell", "count"}
    (curve,) = found["curves"]
    assert (curve["method"], curve["control"]) == ("uniform", True)
    assert [(p["spec"], p["keep_ratio"]) for p in curve["points"]] == [
        ("uniform:keep=16", 0.25),
        ("uniform:keep=32", 0.5),
    ]


def test_a_ratio_that_a_method_cannot_meet_is_left_out() -> None:
    job = Job(EMBEDDED, (), "cpu_fp32")
    found = curves.measure(job, ["uniform:keep=32 + fastv:keep={total}"], (0.25, 0.75), per_kind=1)
    assert [p["keep_ratio"] for p in found["curves"][0]["points"]] == [0.25]
    with pytest.raises(UsageError, match="`keep` must be in"):
        curves.measure(job, ["uniform:keep=32 + fastv:keep={total}"], (0.75,), per_kind=1)


def test_inside_the_language_model_the_index_is_that_of_the_image(tmp_path: Path) -> None:
    question = _task.embedded(1, 1)[0]
    job = Job(EMBEDDED, (), "cpu_fp32")
    both, first = curves.overlays(job, ["uniform:keep=16 + fastv:keep=4", "uniform:keep=16"], question)
    assert (len(first.index), len(both.index)) == (16, 4)
    assert set(both.index.tolist()) < set(first.index.tolist())
    curves.write_overlays(Workspace(tmp_path), [both, first], "Which?")
    listed = json.loads((tmp_path / "evidence" / "overlays.json").read_text())
    assert listed[0] == {"method": both.method, "caption": "Which?", "files": ["1-uniform-keep-16-fastv-keep-4.png"]}
    assert sorted(p.name for p in (tmp_path / "evidence" / "overlays").iterdir()) == [
        "1-uniform-keep-16-fastv-keep-4.png",
        "2-uniform-keep-16.png",
    ]
