"""Where the time of an answer goes, by hand, and as a browser draws it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from exporter.report import Latency, Timing, render, write
from exporter.report.waterfall import Answer, Step, waterfalls
from tests.report.sample import NO_GPU, sample
from tests.report.test_browser import BROWSER, NAMES, browser  # noqa: F401

NO_STAGE = "the unreduced model has no such stage."


def row(stage: str, *ms: float | str) -> Latency:
    return Latency(stage, *(m if isinstance(m, str) else Timing(m, 2 * m) for m in ms))


STAGES = [
    row("vision", 10, 12, 2, 3),
    row("question", NO_STAGE, 4, NO_STAGE, 1),
    row("reduce", 1, 2, 0.5, 1),
    row("prefill", 40, 10, 8, 2),
]
TOKEN = row("decode", 3, 2, 1, 0.5)


def test_stages_come_one_after_another_and_then_the_tokens() -> None:
    engine, torch = waterfalls(sample(latency=STAGES, token=TOKEN, answer_tokens=5))
    assert (engine.runtime, torch.runtime) == ("Engine", "PyTorch")
    assert engine.answers == [
        Answer("unreduced", [Step("vision", 0, 2), Step("reduce", 2, 0.5), Step("prefill", 2.5, 8), Step("decode", 10.5, 1, 4)]),
        Answer("reduced", [
            Step("vision", 0, 3), Step("question", 3, 1), Step("reduce", 4, 1), Step("prefill", 5, 2), Step("decode", 7, 0.5, 4),
        ]),
    ]  # fmt: skip
    assert [a.ms for a in engine.answers] == [14.5, 9] and engine.most_ms == 14.5
    assert [a.ms for a in torch.answers] == [63, 36]


def test_an_answer_of_one_token_is_over_with_prefill() -> None:
    for tokens in (0, 1):
        engine, _ = waterfalls(sample(latency=STAGES, token=TOKEN, answer_tokens=tokens))
        assert [step.stage for step in engine.answers[1].steps] == ["vision", "question", "reduce", "prefill"]


def test_a_stage_that_was_not_timed_leaves_no_bar_of_the_others() -> None:
    rows = [row("vision", 10, 12, 2, NO_GPU), *STAGES[1:]]
    engine, torch = waterfalls(sample(latency=rows, token=TOKEN))
    assert engine.answers[1] == Answer("reduced", [], NO_GPU) and engine.answers[0].steps and torch.answers[1].steps
    page = render(sample(latency=rows, token=TOKEN))
    assert page.count("<tbody>") and f"Not measured: {NO_GPU}" in page
    assert waterfalls(sample(latency=[])) == [] and 'class="waterfall"' not in render(sample(latency=[]))


@pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_bars_on_the_screen(browser: Any, tmp_path: Path, width: int) -> None:  # noqa: F811
    """Each begins where the one before ends, and is as wide as its share of the longest answer."""
    file = write(sample(latency=STAGES, token=TOKEN, answer_tokens=5), tmp_path / "report.html")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(file.as_uri())
    drawn = page.evaluate(
        """() => [...document.querySelectorAll(".waterfall tbody")].map((body) => [...body.querySelectorAll("svg")].map((svg) => {
          const whole = svg.getBoundingClientRect(), bar = svg.querySelector("rect").getBoundingClientRect();
          return [(bar.left - whole.left) / whole.width, (bar.right - whole.left) / whole.width, svg.querySelectorAll(".between").length];
        }))"""
    )
    page.close()
    assert len(drawn) == 4  # the engine's two, PyTorch's two
    at = [0, 3 / 14.5, 4 / 14.5, 5 / 14.5, 7 / 14.5, 9 / 14.5]  # the engine's, reduced
    for (left, right, between), (begin, end) in zip(drawn[1], itertools.pairwise(at), strict=True):
        assert (left, right) == (pytest.approx(begin, abs=1e-3), pytest.approx(end, abs=1e-3))
        assert between == (3 if begin == at[4] else 0)
    assert drawn[0][-1][1] == pytest.approx(1, abs=1e-3)
