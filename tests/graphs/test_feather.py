"""FEATHER against loops written from the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.feather import Feather
from tests.graphs.oracle import attention, best, grid

SIGNALS = frozenset({"plain_row", "attention_row"})
SITE = Site(20, 2, (4, 5), SIGNALS, 8)


def coarse(stride: int) -> list[int]:
    """Tokens on the grid of both frames."""
    return [
        frame * 20 + row * 5 + col for frame in range(2) for row in range(0, 4, stride) for col in range(0, 5, stride)
    ]


@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
@pytest.mark.parametrize(("stride", "first", "second"), [(3, 15, 4), (3, 8, 8), (2, 13, 1), (1, 40, 7), (5, 40, 40)])
@pytest.mark.parametrize("rope", [True, False])
def test_against_the_paper(kind: str, stride: int, first: int, second: int, rope: bool) -> None:
    method = Feather(stride=stride, keep_list=(first, second), rope=rope).fit(SITE)
    assert method.layers == (2, 4)
    (name,) = method.needs
    assert name == ("attention_row" if rope else "plain_row")
    hidden = torch.arange(40.0)[None, :, None].expand(2, -1, 3)
    row = attention(kind, (2, 40))
    out = method.forward(2, {name: torch.from_numpy(row), "hidden": hidden})
    for b in range(2):
        kept = coarse(stride)
        for place in best([grid(a, 1 / 40) for a in row[b]], 40):
            if len(kept) < first and place not in kept:
                kept.append(place)
        assert out.index[b].tolist() == sorted(kept)
    assert torch.equal(out.tokens[..., 0], out.index.float())
    row = attention(kind, (2, first), seed=7)
    last = method.forward(4, {name: torch.from_numpy(row), "hidden": out.tokens})
    for b in range(2):
        places = sorted(best([grid(a, 1 / first) for a in row[b]], second))
        assert last.index[b].tolist() == places
        assert last.tokens[b, :, 0].tolist() == [out.tokens[b, p, 0].item() for p in places]


@pytest.mark.parametrize(
    ("side", "second", "counts"),
    [(24, "present", (217, 19)), (24, "all", (217, 51)), (27, "present", (275, 24)), (27, "all", (275, 65))],
)
def test_the_papers_counts(side: int, second: Any, counts: tuple[int, int]) -> None:
    where = Site(side * side, 1, (side, side), SIGNALS, 32)
    fitted = Feather(second=second).fit(where)
    assert (fitted.layers, fitted.keep_list, fitted.position) == ((8, 16), counts, "keep")
    assert fitted.fit(where) == fitted
    again = Feather(second=second, keep=counts[1]).fit(where).keep_list
    assert again is not None
    assert abs(again[0] - counts[0]) <= 6, "as r was rounded away"


@pytest.mark.parametrize("second", ["present", "all"])
@pytest.mark.parametrize("stride", [1, 2, 3, 9])
def test_any_count_can_be_asked_for(second: Any, stride: int) -> None:
    """Of r the first stage keeps r · all + (1 - r) · grid, the second r² of these or of all."""
    before, on = 0, len(coarse(stride))
    for keep in range(1, 41):
        fitted = Feather(keep=keep, stride=stride, second=second).fit(SITE)
        assert fitted.keep_list is not None
        first, last = fitted.keep_list
        assert last == keep == fitted.after(SITE).total
        assert max(before - 1, keep, on) <= first <= 40
        rs = [i / 1000 for i in range(1001)]
        r = min(rs, key=lambda r: abs(r * r * (r * 40 + (1 - r) * on if second == "present" else 40) - keep))
        assert abs(first - (r * 40 + (1 - r) * on)) <= 1.5, "both parts are rounded"
        before = first
    assert Feather(keep_ratio=1.0).fit(SITE).keep_list == (40, 40)


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (Feather(), Site(20, 2, None, SIGNALS, 8), "it needs the raster of the tokens, which is lost here"),
        (Feather(raster=(4, 4)), SITE, r"`raster` must be rows and columns of the 20 tokens of a frame; found 4\+4"),
        (Feather(raster=(20,)), SITE, "found 20"),
        (Feather(stride=0), SITE, "at least 1; found 0"),
        (Feather(layer_list=(2,)), SITE, "`layer_list` needs two layers; found 2"),
        (Feather(keep_list=(7, 3)), SITE, r"grid of stride 3 has 8 tokens, so .* must be in 8..40; found 7"),
    ],
)
def test_refusals(method: Feather, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)


def test_raster_can_be_given() -> None:
    assert Feather(raster=(4, 5)).fit(Site(20, 2, None, SIGNALS, 8)) == Feather().fit(SITE)
