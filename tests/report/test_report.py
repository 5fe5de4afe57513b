from __future__ import annotations

import re
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest

from exporter.errors import VerificationError
from exporter.graphset import tokens_in_words
from exporter.report import Quality, ReportData, Score, Timing, render, write
from exporter.report.report import headline, in_bytes, ratio
from tests.report.sample import NO_GPU, sample

VOID = {"meta", "link", "br", "img", "hr", "input"}
EVIL = "<script>alert('x')</script>\" onload=\"x"


class Checker(HTMLParser):
    """Every element is closed, in order; counts elements; keeps attributes and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + " "


def check(data: ReportData) -> Checker:
    checker = Checker()
    checker.feed(render(data))
    checker.close()
    assert not checker.open
    checker.text = " ".join(checker.text.split())
    return checker


def empty() -> ReportData:
    kept = {f.name: getattr(sample(), f.name) for f in fields(ReportData) if f.name in (
        "title", "checkpoint", "family", "profile", "backend", "precision", "device", "created")}  # fmt: skip
    return ReportData(**kept, bundle_bytes="nothing was packed", unreduced_tokens=576, kept_tokens=576, reductions=[])


def test_whole_report(tmp_path: Path) -> None:
    page = check(sample())
    assert page.seen.count("section") == 10
    assert page.seen.count("img") == 3
    assert "576 → 64 tokens (11 % kept, 9.0× fewer), by visionzip, then fastv" in page.text
    path = write(sample(), tmp_path / "evidence" / "report.html")
    assert path.read_text(encoding="utf-8") == render(sample())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("data", [sample(), empty()], ids=["full", "empty"])
def test_nothing_comes_from_outside(data: ReportData) -> None:
    text = render(data)
    assert not re.search(r"""(src|href|action|data)\s*=\s*["']?\s*(https?:)?//""", text)
    assert not re.search(r"url\(|@import|<script|<link|<iframe|javascript:", text)
    page = check(data)
    assert all((value or "").startswith("data:image/png;base64,") for name, value in page.attributes if name == "src")
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "href"]
    assert any("default-src 'none'" in (value or "") for _, value in page.attributes)


def test_every_string_is_escaped() -> None:
    def poison(value: object) -> object:
        if isinstance(value, str):
            return value + EVIL
        if isinstance(value, list):
            return [poison(v) for v in value]
        if isinstance(value, dict):
            return {poison(k) if isinstance(k, str) else k: poison(v) for k, v in value.items()}
        if hasattr(value, "__dataclass_fields__"):
            known = {"variant"}
            return type(value)(
                **{
                    f: getattr(value, f) if f in known else poison(getattr(value, f))
                    for f in value.__dataclass_fields__
                }
            )
        return value

    data = poison(sample())
    assert isinstance(data, ReportData)
    text = render(data)
    assert "<script" not in text
    page = check(data)
    assert "script" not in page.seen
    assert "onload" not in {name for name, _ in page.attributes}
    assert page.text.count("<script>alert('x')</script>") > 60


def test_missing_numbers_say_why() -> None:
    page = check(sample())
    assert f"Not measured: {NO_GPU}" in page.text
    assert page.text.count("not measured") > 15
    assert "3 of 4 engines built, not run here" in page.text
    assert "Not executed on this machine: vision, prefill, decode" in page.text


def test_empty_report_pretends_nothing() -> None:
    page = check(empty())
    for what in (
        "no questions were put",
        "no stage was timed",
        "no stage was compared",
        "nothing was built",
        "no engine was profiled",
    ):
        assert f"Not measured: {what}" in page.text
    assert [key.missing for key in headline(empty())] == [False, True, True, True]


def test_headline() -> None:
    tokens, accuracy, first, size = headline(sample())
    assert (tokens.value, tokens.detail) == ("576 → 64", "11 % kept, 9.0× fewer")
    assert accuracy.value == "93.3 %"
    assert accuracy.detail == "PyTorch, reduced · unreduced 95.8 % · random 63.5 % · uniform 59.5 %"
    assert (first.value, first.detail) == ("3.31× faster", "412 → 125 ms, PyTorch, median")
    assert size.value == "9.41 MB"


def test_engine_comes_first_in_the_headline_where_it_ran() -> None:
    rows = [Quality("reduced", "r", {"cell": Score(9, 10)}), Quality("engine", "e", {"cell": Score(8, 10)})]
    assert headline(sample(quality=rows))[1].value == "80.0 %"
    half = [rows[0], Quality("engine", "e", {"cell": Score(8, 10), "count": NO_GPU})]
    assert headline(sample(quality=half))[1].value == "90.0 %"


def test_json_round_trip(tmp_path: Path) -> None:
    sample().save(tmp_path / "report.json")
    assert ReportData.from_json((tmp_path / "report.json").read_text(encoding="utf-8")) == sample()
    assert ReportData.from_json(empty().to_json()) == empty()
    with pytest.raises(VerificationError, match="colour"):
        ReportData.from_json('{"colour": 1}')


def test_wilson_interval() -> None:
    low, high = Score(98, 100).interval
    assert (round(low, 3), round(high, 3)) == (0.930, 0.994)
    assert Score(0, 20).interval[0] == 0
    assert Score(20, 20).interval[1] == pytest.approx(1)
    assert Score(20, 20).interval[0] < 0.9


def test_words() -> None:
    assert tokens_in_words(576, 64) == "576 → 64 tokens (11 % kept, 9.0× fewer)"
    assert ratio(Timing(100, 1), Timing(50, 1)) == "2× faster"
    assert ratio(Timing(50, 1), Timing(100, 1)) == "2× slower"
    assert ratio(Timing(100, 1), Timing(101, 1)) == "the same"
    assert ratio(Timing(100, 1), NO_GPU) is None
    assert [in_bytes(n) for n in (12, 18_402, 9_412_331, 2_371_000_000)] == ["12 B", "18.4 kB", "9.41 MB", "2.37 GB"]


def test_same_data_same_page() -> None:
    assert render(sample()) == render(sample())
