"""The evidence page: its verdicts, and that it is what its record says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import methods

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("right", "draws", "expected"),
    [
        (90, [50, 52, 48, 51, 49], "better"),
        (50, [90, 92, 88, 91, 89], "**loses**"),
        (52, [50, 52, 48, 51, 49], "level"),
        (60, [30, 50, 70, 90, 35], "level"),  # draws that differ a lot say little
        (100, [100, 100, 100, 100, 100], "level"),
        (0, [0, 0, 0, 0, 0], "level"),
    ],
)
def test_verdicts(right: int, draws: list[int], expected: str) -> None:
    """100 answers each. At 50 % the standard error of 100 answers is 5 %."""
    assert methods.verdict({"cell": (right, 100)}, [{"cell": (d, 100)} for d in draws]) == expected


def test_a_label_leaves_the_ratio_out() -> None:
    assert methods._label("visionzip:keep_ratio=0.5") == "visionzip"
    assert methods._label("restore:keep_ratio=0.25,share=1+visionzip:cls=off") == "restore:share=1+visionzip:cls=off"
    assert methods._label("tome:keep_ratio=0.1111,position=keep") == "tome:position=keep"


def test_methods_that_renumber_positions_are_tried_with_original_ones_too() -> None:
    specs = [spec for _, spec, _ in methods.tried("visionzip")]
    assert specs[:2] == ["visionzip:keep_ratio=0.5", "visionzip:keep_ratio=0.5,position=keep"]
    assert [media for media, _, _ in methods.tried("dtd")] == ["clip"] * 2, "25 and 11 % both leave the first frame"
    assert next(spec for _, spec, _ in methods.tried("restore")) == "restore:keep_ratio=0.5+divprune"


def test_the_page_is_that_of_its_record() -> None:
    text = methods.PAGE.read_text(encoding="utf-8")
    found = re.search(r"\(\.\./benchmarks/results/(.*?)\)", text)
    assert found is not None
    record = json.loads((ROOT / "benchmarks" / "results" / found[1]).read_text(encoding="utf-8"))
    assert methods.page(record) == text
    assert record["file"] == found[1]
