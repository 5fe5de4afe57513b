"""FastV against a loop written from the paper."""

from __future__ import annotations

import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.fastv import FastV
from tests.graphs.oracle import attention, best, grid

SITE = Site(12, frames=2, grid=(3, 4), signals=frozenset({"attention_row", "plain_row"}), depth=6)


@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
@pytest.mark.parametrize("keep", [1, 5, 12, 24])
@pytest.mark.parametrize("rope", [True, False])
def test_against_the_paper(kind: str, keep: int, rope: bool) -> None:
    row = attention(kind, (3, 24))
    hidden = torch.arange(24.0)[None, :, None].expand(3, -1, 2)
    method = FastV(keep=keep, rope=rope).fit(SITE)
    (name,) = method.needs
    assert name == ("attention_row" if rope else "plain_row")
    tokens, index, _ = method.forward(2, {name: torch.from_numpy(row), "hidden": hidden})
    assert torch.equal(tokens[..., 0], index.float())
    assert index.dtype == torch.int64
    for b in range(3):
        assert index[b].tolist() == sorted(best([grid(s, 1 / 24) for s in row[b]], keep))
    if kind == "equal":
        assert index.tolist() == [list(range(keep))] * 3


def test_order_of_heads_does_not_matter() -> None:
    heads = attention("random", (2, 8, 24))
    method = FastV(keep=7).fit(SITE)
    rows = [torch.from_numpy(h.mean(1)) for h in (heads, heads[:, ::-1])]
    hidden = torch.zeros(2, 24, 2)
    assert torch.equal(*(method.forward(2, {"attention_row": r, "hidden": hidden}).index for r in rows))


@pytest.mark.parametrize(("ratio", "keep"), [(None, 12), (0.25, 6), (0.52, 12), (0.53, 13), (1.0, 24)])
def test_ratio_is_one_minus_the_papers_r(ratio: float | None, keep: int) -> None:
    method = FastV(keep_ratio=ratio).fit(SITE)
    assert method.keep == keep
    assert method.kept(2) == keep
    assert method.layers == (2,)
    assert method.after(SITE) == Site(keep, 1, None, SITE.signals, 6)
    assert method.fit(SITE) == method


def test_two_in_a_row() -> None:
    first = FastV(layer=1, keep=10).fit(SITE)
    second = FastV(layer=3).fit(first.after(SITE))
    assert second.kept(3) == 5


@pytest.mark.parametrize("layer", [0, 6, -1])
def test_layer_in_range(layer: int) -> None:
    with pytest.raises(ReductionError, match=r"`layer` must be in 1..5, as the model has 6 decoder layers .* found"):
        FastV(layer=layer).fit(SITE)


def test_keep_counts_all_frames() -> None:
    assert FastV(keep=24).fit(SITE).keep == 24
    with pytest.raises(ReductionError, match=r"1..24, as there are 24 visual tokens in the language model; found 25"):
        FastV(keep=25).fit(SITE)
