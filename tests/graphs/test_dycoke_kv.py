"""DyCoke's second stage against a loop written from the paper, as far as one choice for the whole answer is the same."""

from __future__ import annotations

import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.dycoke_kv import DyCokeKV
from tests.graphs.oracle import attention, best, grid

SITE = Site(12, frames=2, grid=(3, 4), signals=frozenset({"attention_row"}), depth=6, kv_heads=2)


@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
@pytest.mark.parametrize("keep", [1, 5, 24])
def test_against_the_paper(kind: str, keep: int) -> None:
    row = attention(kind, (3, 24))
    index = DyCokeKV(keep=keep).fit(SITE).choose(3, {"attention_row": torch.from_numpy(row)})
    assert index.dtype == torch.int64
    for b in range(3):
        assert index[b].tolist() == sorted(best([grid(s, 1 / 24) for s in row[b]], keep))


@pytest.mark.parametrize(("depth", "layer"), [(28, 3), (4, 3), (2, 1), (1, 0)])
def test_all_layers_from_the_papers_on_share_a_choice(depth: int, layer: int) -> None:
    method = DyCokeKV().fit(Site(100, signals=SITE.signals, depth=depth))
    assert method.start == layer
    assert method.shared
    assert {method.kept(i) for i in range(layer, depth)} == {30}, "1 - P of the tokens"
    assert method.after(SITE).total == 30
    assert method.fit(Site(100, signals=SITE.signals, depth=depth)) == method


@pytest.mark.parametrize("layer", [6, -1])
def test_layer_in_range(layer: int) -> None:
    with pytest.raises(ReductionError, match=r"`layer` must be in 0..5, as the model has 6 decoder layers; found"):
        DyCokeKV(layer=layer).fit(SITE)


def test_keep_counts_all_frames() -> None:
    assert DyCokeKV(keep=24).fit(SITE).keep == 24
    with pytest.raises(ReductionError, match=r"1..24, as there are 24 visual tokens in the cache; found 25"):
        DyCokeKV(keep=25).fit(SITE)
