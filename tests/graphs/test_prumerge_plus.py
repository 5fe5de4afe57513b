"""PruMerge+ against the loop of PruMerge, with samples among the centres."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from graphs._contract import ReductionError
from graphs.prumerge import PruMerge
from graphs.prumerge_plus import PruMergePlus
from tests.graphs.oracle import KINDS, run_merging
from tests.graphs.test_prumerge import NO_CLS, WITH_CLS, N, check, signals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("keep", "outliers", "samples"), [(9, None, 6), (12, 8, 3), (2, None, 0), (N, 1, 20), (5, 4, 0)]
)
@pytest.mark.parametrize("order", ["paper", "raster"])
@pytest.mark.parametrize("cls", [True, False])
def test_against_the_description(
    kind: str, keep: int, outliers: int | None, samples: int, order: Any, cls: bool
) -> None:
    method = PruMergePlus(keep=keep, neighbours=4, order=order, outliers=outliers).fit(WITH_CLS if cls else NO_CLS)
    check(method, kind, samples, cls)


def test_plus_with_outliers_only_is_prumerge() -> None:
    given = signals("random")
    plain, plus = PruMerge(keep=6).fit(WITH_CLS), PruMergePlus(keep=6, outliers=5).fit(WITH_CLS)
    assert all((x == y).all() for x, y in zip(run_merging(plain, given), run_merging(plus, given), strict=True))


def test_paper_split() -> None:
    site = dataclasses.replace(WITH_CLS, tokens=576)
    assert {k: PruMergePlus(keep=k).fit(site).outliers for k in (145, 144, 33, 2)} == {145: 36, 144: 36, 33: 8, 2: 1}


def test_what_fit_resolves() -> None:
    method = PruMergePlus(keep_ratio=0.5).fit(WITH_CLS)
    assert (method.keep, method.outliers, method.merges, method.position) == (11, 3, True, "compact")
    assert method.fit(WITH_CLS) == method


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PruMergePlus(keep=1), "must be at least 2; found 1"),
        (PruMergePlus(keep=4, outliers=4), r"`outliers` is a part of the 3 centres .* in 1..3; found 4"),
        (PruMergePlus(keep=4, outliers=0), "found 0"),
    ],
)
def test_refusals(method: PruMergePlus, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(WITH_CLS)
