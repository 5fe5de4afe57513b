"""The page of a search, as text and in a real browser from `file://`."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.report import tune
from exporter.tune import report
from exporter.workspace import write_text
from tests.report.test_browser import BROWSER, CONTRAST, NAMES, OUTSIDE, UNREADABLE, browser  # noqa: F401
from tests.tune.sample import HOSTILE, result, wanted

in_a_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")


def test_the_policy_allows_the_one_script_there_is() -> None:
    page = tune.render(result(), wanted(HOSTILE))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in page
    assert HOSTILE not in page


def test_every_candidate_is_a_spot_and_a_row() -> None:
    page = tune.render(result(), wanted())
    finalists, asked = re.findall(r"<figure>.*?</figure>", page, re.S)
    assert re.findall(r'data-place="(\d)"', finalists) == ["2", "1", "0"]  # from left to right
    assert sorted(re.findall(r'data-place="(\d)"', asked)) == ["0", "1", "2", "3", "4"]
    assert page.count("<tr id=") == 5 and "not among the 2 of rung 1 that went on" in page


def test_the_stairs_of_the_front_go_through_its_points() -> None:
    page = tune.render(result(), wanted())
    (stairs,) = re.findall(r'<polyline points="([^"]+)" class="series s2 dashed"', page)
    corners = [tuple(map(float, p.split(","))) for p in stairs.split()]
    assert len(corners) == 5  # three points, and a corner between two of them
    xs, ys = zip(*corners, strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)  # on the screen up is less


def test_before_anything_was_exported_there_is_no_winner() -> None:
    found = result()
    entries = tuple(replace(e, engine=(), measured=None) for e in found.entries)
    page = tune.render(replace(found, entries=entries, winner=None, front=(), warnings=()), wanted())
    assert "The search goes on" in page and "edgetrim run" not in page
    nothing = tuple(replace(e, engine=(), measured=None, scores=()) for e in found.entries)
    assert "<svg" not in tune.render(replace(found, entries=nothing, winner=None, front=(), warnings=()), wanted())


def test_the_command_is_quoted_for_a_shell() -> None:
    assert shlex.split(report.command(result(), wanted("a model; rm"))) == [
        "edgetrim", "run", "a model; rm", "--reduce", "visionzip:keep=32", "--profile", "cpu_fp32", "--frames", "4",
        "--image-size", "56x112", "--questions", "my questions.jsonl", "--output", "winner",
    ]  # fmt: skip


@in_a_browser
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(browser: Any, tmp_path: Path, scheme: str, width: int) -> None:  # noqa: F811
    file = tmp_path / "tune.html"
    write_text(file, tune.render(result(), wanted(HOSTILE)))
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    wrong: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda said: wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(file.as_uri())

    first = page.locator("figure").first
    first.locator("[data-place='1']").focus()
    said = first.locator("output")
    assert "visionzip:keep=32 on cpu_fp32: 95.0 % of 20 right" in said.inner_text()
    assert page.locator("tr.told").get_attribute("id") == "c1"
    assert page.evaluate(UNREADABLE, CONTRAST) == []  # with a row that is told
    page.keyboard.press("ArrowRight")
    assert said.inner_text().startswith("unreduced on cpu_fp32: 100.0 %")
    page.keyboard.press("ArrowRight")  # from the last to the first
    assert said.inner_text().startswith("fastv:layer=2,keep=32")
    first.locator("[data-place='0']").hover()
    assert said.inner_text().startswith("unreduced")

    assert not wrong
    assert fetched == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert page.evaluate(OUTSIDE) == []
    page.close()
