"""VScan's stage in the language model against a loop written from the paper."""

from __future__ import annotations

import pytest
import torch

from graphs._contract import Site
from graphs.vscan_l import VScanL
from tests.graphs.oracle import attention, best, grid

SITE = Site(12, frames=2, grid=(3, 4), signals=frozenset({"next_row", "next_plain_row"}), depth=7)


@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
@pytest.mark.parametrize("keep", [1, 8, 24])
@pytest.mark.parametrize("rope", [True, False])
def test_against_the_paper(kind: str, keep: int, rope: bool) -> None:
    row = attention(kind, (3, 24)) / 2
    hidden = torch.arange(24.0)[None, :, None].expand(3, -1, 2)
    method = VScanL(keep=keep, rope=rope).fit(SITE)
    (name,) = method.needs
    assert name == ("next_row" if rope else "next_plain_row")
    tokens, index, size = method.forward(4, {name: torch.from_numpy(row), "hidden": hidden})
    assert size is None
    assert torch.equal(tokens[..., 0], index.float())
    for b in range(3):
        assert index[b].tolist() == sorted(best([grid(a, 1 / 24) for a in row[b]], keep))


@pytest.mark.parametrize(("tokens", "depth", "keep", "layer"), [(96, 32, 32, 16), (96, 28, 32, 14), (24, 7, 8, 4)])
def test_the_papers_counts(tokens: int, depth: int, keep: int, layer: int) -> None:
    where = Site(tokens, 1, None, SITE.signals, depth)
    fitted = VScanL().fit(where)
    assert (fitted.layers, fitted.kept(layer), fitted.position) == ((layer,), keep, "compact")
    assert VScanL(keep_ratio=0.25).fit(where).keep == tokens // 4


def test_grid_positions_stay() -> None:
    """And there the official code scores without RoPE."""
    fitted = VScanL().fit(Site(12, 1, None, SITE.signals, 8, grid_positions=True))
    assert (fitted.position, fitted.rope, fitted.needs) == ("keep", False, ("next_plain_row",))
    assert VScanL().fit(SITE).rope is True
    assert VScanL(rope=True).fit(Site(12, 1, None, SITE.signals, 8, grid_positions=True)).rope is True
