"""Shared blocks at their edges: ties, everything kept, beyond TensorRT's TopK limit."""

from __future__ import annotations

import pytest
import torch

from graphs import _blocks
from graphs._blocks import ascending, complement, placement, rank, select


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randint(0, 4, (3, 20), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_rank_beyond_the_limit_is_the_same(
    scores: torch.Tensor, k: int, largest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, kept = rank(scores, k, largest=largest), select(scores, k)
    place = placement(scores, largest=largest)
    assert all(place[b, i] == j for b in range(3) for j, i in enumerate(usual[b].tolist()))
    monkeypatch.setattr(_blocks, "TOPK_LIMIT", 0)
    assert torch.equal(rank(scores, k, largest=largest), usual)
    assert torch.equal(select(scores, k), kept)


@pytest.mark.parametrize("k", [1, 7, 19])
def test_complement(scores: torch.Tensor, k: int) -> None:
    index = ascending(rank(scores, k))
    rest = complement(index, 20)
    for row, other in zip(index.tolist(), rest.tolist(), strict=True):
        assert other == [i for i in range(20) if i not in row]
