from __future__ import annotations

import re

import pytest

from exporter.errors import UsageError
from exporter.tune.budget import Budget, parse_all


def test_budgets_with_and_without_their_unit() -> None:
    assert parse_all(("latency=40ms", "ttft = 12.5", "memory=3000 MiB", "quality_drop=2points")) == (
        Budget("latency", 40), Budget("ttft", 12.5), Budget("memory", 3000), Budget("quality_drop", 2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latencey=4", "There is no budget 'latencey'. Did you mean 'latency'?"),
        ("memory=4GiB", "no figure in MiB; write it as in memory=20MiB"),
        ("ttft", "no figure in ms"),
        ("ttft=-1", "no figure in ms"),
        ("ttft=nan", "no figure in ms"),
    ],
)
def test_what_is_no_budget(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        Budget.parse(text)


def test_a_budget_is_given_once() -> None:
    with pytest.raises(UsageError, match="'ttft' is given twice"):
        parse_all(("ttft=1", "ttft=2"))
