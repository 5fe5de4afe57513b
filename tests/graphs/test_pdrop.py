"""PyramidDrop against a loop written from the paper."""

from __future__ import annotations

import pytest
import torch

from graphs._contract import Site
from graphs.pdrop import PyramidDrop
from tests.graphs.oracle import attention, best, grid

SITE = Site(12, frames=2, grid=(3, 4), signals=frozenset({"next_row", "next_plain_row"}), depth=8)


@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("counts", [(12, 6, 3), (24, 24, 1), (20,), (9, 9)])
def test_against_the_paper(kind: str, rope: bool, counts: tuple[int, ...]) -> None:
    method = PyramidDrop(layer_list=(2, 4, 6)[: len(counts)], keep_list=counts, rope=rope).fit(SITE)
    (name,) = method.needs
    assert name == ("next_row" if rope else "next_plain_row")
    hidden = torch.arange(24.0)[None, :, None].expand(2, -1, 3)
    present = [list(range(24)), list(range(24))]
    for stage, (layer, keep) in enumerate(zip(method.layers, counts, strict=True)):
        n = len(present[0])
        row = 0.7 * attention(kind, (2, n), seed=stage)  # the rest of the attention goes to the text
        out = method.forward(layer, {name: torch.from_numpy(row), "hidden": hidden})
        for b in range(2):
            places = sorted(best([grid(a, 1 / n) for a in row[b]], keep))
            assert out.index[b].tolist() == places
            present[b] = [present[b][p] for p in places]
            assert out.tokens[b, :, 0].tolist() == present[b]
        assert out.size is None
        hidden = out.tokens
        if kind == "equal":
            assert present == 2 * [list(range(keep))]


def test_rounding_does_not_decide() -> None:
    noise = torch.from_numpy(attention("random", (2, 24))) * 1e-6
    method = PyramidDrop(keep=5).fit(SITE)
    out = method.forward(2, {"next_row": 1 / 24 + noise, "hidden": torch.zeros(2, 24, 3)})
    assert out.index.tolist() == 2 * [list(range(method.kept(2)))]


def test_the_papers_counts() -> None:
    where = Site(576, 1, (24, 24), SITE.signals, 32)
    fitted = PyramidDrop().fit(where)
    assert (fitted.layers, fitted.keep_list, fitted.keep) == ((8, 16, 24), (288, 144, 72), 72)
    assert PyramidDrop(keep_ratio=0.125).fit(where) == PyramidDrop(keep=72).fit(where) == fitted
    assert PyramidDrop(layer_list=(4, 9)).fit(where).keep_list == (288, 144)
    assert PyramidDrop(keep_ratio=1.0).fit(where).keep_list == (576, 576, 576)
    assert PyramidDrop().fit(Site(27, 1, None, SITE.signals, 8)).keep_list == (13, 6, 3), "rounded down"
    assert PyramidDrop(keep=1).fit(Site(27, 1, None, SITE.signals, 8)).keep_list == (9, 3, 1), "λ = 1/3"


def test_position() -> None:
    assert PyramidDrop().fit(SITE).position == "compact"
    assert PyramidDrop(position="keep").fit(SITE).position == "keep"
    assert PyramidDrop().fit(Site(12, 1, None, SITE.signals, 8, grid_positions=True)).position == "keep"
