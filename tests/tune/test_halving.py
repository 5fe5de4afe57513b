"""The arithmetic of successive halving, by hand."""

from __future__ import annotations

import itertools

import pytest

from exporter.tune.halving import Rung, answers, schedule


def test_27_candidates_and_90_questions() -> None:
    rungs = schedule(27, 90, 1, eta=3, least=1)
    assert rungs == (Rung(27, 10, 9), Rung(9, 30, 3), Rung(3, 90, 1))
    assert answers(rungs) == 27 * 10 + 9 * 20 + 3 * 60


def test_few_candidates_are_asked_everything_at_once() -> None:
    assert schedule(3, 50, 4) == (Rung(3, 50, 3),)
    assert schedule(4, 50, 4) == (Rung(4, 50, 4),)


def test_no_rung_asks_fewer_than_the_least() -> None:
    assert schedule(100, 40, 4, eta=3, least=16) == (Rung(100, 16, 34), Rung(34, 16, 12), Rung(12, 40, 4))
    assert [r.questions for r in schedule(100, 5, 4, least=16)] == [5, 5, 5]


def test_nothing_to_halve() -> None:
    assert schedule(0, 50, 4) == schedule(3, 0, 4) == ()
    assert answers(()) == 0


@pytest.mark.parametrize(
    ("count", "questions", "finalists"), [*itertools.product((1, 2, 7, 150), (1, 17, 400), (1, 4))]
)
def test_what_always_holds(count: int, questions: int, finalists: int) -> None:
    rungs = schedule(count, questions, finalists)
    assert rungs[0].enter == count and rungs[-1].questions == questions
    assert rungs[-1].survive == min(count, finalists)
    for one, two in itertools.pairwise(rungs):
        assert one.survive == two.enter < one.enter and one.questions <= two.questions
    assert answers(rungs) <= count * questions
