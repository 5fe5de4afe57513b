"""Candidates of the embedded model: what fits, what does not and why, and the controls beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.errors import UsageError
from exporter.job import EMBEDDED, Job
from exporter.tune.candidates import candidates, templates
from graphs import _spec
from tests.families import tiny

JOB = Job(EMBEDDED, (), "cpu_fp32")


def test_every_method_has_controls_of_its_count() -> None:
    found, left = candidates(JOB, ("visionzip:keep={keep}",), (0.5, 0.25), ("cpu_fp32", "cpu_int4"))
    assert left == []
    for profile in ("cpu_fp32", "cpu_int4"):
        mine = [c for c in found if c.profile == profile]
        assert mine[0].reductions == () and mine[0].role == "unreduced"
        assert [c.spec for c in mine if c.role == "method"] == ["visionzip:keep=32", "visionzip:keep=16"]
        controls = {(c.spec.partition(":")[0], _spec.parse(c.spec).keep) for c in mine if c.role == "control"}
        assert controls == {("random", 32), ("uniform", 32), ("random", 16), ("uniform", 16)}
    assert len({c.key for c in found}) == len(found)


def test_controls_stand_behind_a_projector_that_shortens(tmp_path: Path) -> None:
    """Of MobileVLM's 4 tokens, half."""
    tiny.mobilevlm(tmp_path)
    found, left = candidates(
        Job(str(tmp_path), (), "cpu_fp32"), ("fastv:keep_ratio={ratio},layer=1",), (0.5,), ("cpu_fp32",)
    )
    assert left == []
    controls = [_spec.parse(c.spec) for c in found if c.role == "control"]
    assert [(_spec.name(c), c.keep, c.space) for c in controls] == [("random", 2, "llm"), ("uniform", 2, "llm")]


def test_what_does_not_fit_is_left_out_with_its_reason() -> None:
    found, left = candidates(JOB, ("slowfast", "fastv:keep={total},layer=99"), (0.5,), ("cpu_fp32",))
    assert [c.role for c in found] == ["unreduced"]
    assert [entry.spec for entry in left] == ["slowfast:keep_ratio=0.5", "fastv:keep=32,layer=99"]
    assert "needs at least 2 frames" in left[0].reason and "layer" in left[1].reason


def test_a_method_without_a_ratio_is_one_candidate() -> None:
    found, _ = candidates(JOB, ("vtw",), (0.5, 0.25), ("cpu_fp32",))
    assert [c.spec for c in found if c.role == "method"] == ["vtw"]


def test_templates() -> None:
    assert templates(("visionzip, fastv", "tome:keep={keep} + fastv:keep={total}")) == [
        "visionzip:keep_ratio={ratio}", "fastv:keep_ratio={ratio}", "tome:keep={keep} + fastv:keep={total}",
    ]  # fmt: skip
    assert {t.partition(":")[0] for t in templates(())} == set(_spec.names()) - {"random", "uniform"}
    with pytest.raises(UsageError, match="Unknown reduction 'vizionzip'"):
        templates(("vizionzip",))
    with pytest.raises(UsageError, match=r"has the placeholder \{rate\}"):
        templates(("visionzip:keep_ratio={rate}",))
    for nothing in ("random,uniform", ","):
        with pytest.raises(UsageError, match="names nothing to search for"):
            templates((nothing,))
