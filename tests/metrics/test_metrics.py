"""What each metric takes for right, by hand; and that all of them keep the contract."""

from __future__ import annotations

import pytest

from exporter.errors import UsageError
from exporter.metrics import _contract as metrics
from exporter.metrics import anls


@pytest.mark.parametrize(
    ("metric", "answer", "expected", "score"),
    [
        ("exact", " Yes ", ["yes"], 1),
        ("exact", "yes.", ["yes"], 0),
        ("exact", "no", ["yes", "No"], 1),
        ("contains", "There is a Cat on it.", ["a cat"], 1),
        ("contains", "A catalogue.", ["a cat"], 0),
        ("contains", "It says 1.5 metres", ["1.5"], 1),
        ("contains", "It says 11.5 metres", ["1.5"], 0),
        ("numeric", "There are 1,200 of them.", ["1200"], 1),
        ("numeric", "1.2e3", ["1200"], 1),
        ("numeric", "$4.50", ["4.5"], 1),
        ("numeric", "45%", ["45"], 1),
        ("numeric", "Two.", ["2"], 1),
        ("numeric", "someone", ["1"], 0),
        ("numeric", "3 + 4 = 7", ["7"], 1),
        ("numeric", "1990-2000", ["2000"], 1),
        ("numeric", "It is -5 degrees", ["-5"], 1),
        ("numeric", "none", ["0"], 0),
        ("numeric", "12", ["12.1"], 0),
        ("choice", "B", ["B"], 1),
        ("choice", "(b)", ["B"], 1),
        ("choice", "B. a cat", ["b"], 1),
        ("choice", "The answer is C.", ["C"], 1),
        ("choice", "A cat is to be seen, so (D)", ["D"], 1),
        ("choice", "I think it is a cat", ["I"], 0),
        ("choice", "A", ["B"], 0),
        # Biten et al., equation 1: 1 − 1/6 for a letter of six; nothing from half on.
        ("anls", "Kittem", ["kitten"], 1 - 1 / 6),
        ("anls", "sitting", ["kitten"], 1 - 3 / 7),
        ("anls", "abcd", ["abxyz"], 0),
        ("anls", "", ["kitten"], 0),
        ("anls", "two   words", ["other", "Two words"], 1),
    ],
)
def test_scores(metric: str, answer: str, expected: list[str], score: float) -> None:
    assert metrics.load(metric)(answer, expected) == pytest.approx(score)


def test_distance() -> None:
    """The textbook's examples."""
    assert [anls.distance(*pair) for pair in (("kitten", "sitting"), ("saturday", "sunday"), ("", "ab"))] == [3, 3, 2]


def test_there_are_metrics() -> None:
    assert metrics.names() == ["anls", "choice", "contains", "exact", "numeric"]


@pytest.mark.parametrize("name", metrics.names())
def test_the_contract(name: str) -> None:
    metric = metrics.load(name)
    for answer in ("", "?", "x" * 300, "B", "2", "日本"):
        assert 0 <= metric(answer, ["B"]) <= 1
    assert metric("B" if name != "numeric" else "7", ["Q", "B", "7"]) == 1


@pytest.mark.parametrize(("metric", "answer"), [("numeric", "many"), ("choice", "a big cat"), ("contains", "?")])
def test_an_answer_that_cannot_be_right(metric: str, answer: str) -> None:
    with pytest.raises(UsageError, match="cannot score the right answer"):
        metrics.check(metric, [answer])


def test_an_unknown_metric() -> None:
    with pytest.raises(UsageError, match="Did you mean 'exact'"):
        metrics.check("exac", ["a"])
