"""VTW: nothing stays."""

from __future__ import annotations

import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.vtw import Vtw

SITE = Site(12, frames=2, grid=(3, 4), signals=frozenset({"hidden"}), depth=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_stays(dtype: torch.dtype) -> None:
    method = Vtw().fit(SITE)
    tokens, index, size = method.forward(3, {"hidden": torch.ones(2, 24, 5, dtype=dtype)})
    assert tokens.shape == (2, 0, 5)
    assert tokens.dtype == dtype
    assert index.shape == (2, 0)
    assert index.dtype == torch.int64
    assert size is None
    assert method.kept(3) == method.after(SITE).total == 0


def test_in_the_middle() -> None:
    assert [Vtw().fit(Site(4, signals=SITE.signals, depth=d)).layers for d in (32, 40, 28, 4)] == [
        (16,),
        (20,),
        (14,),
        (2,),
    ]
    assert Vtw(k=5).fit(SITE).layers == (5,)
    assert Vtw().fit(SITE).position == "keep"
    assert Vtw(position="compact").fit(SITE).position == "compact"


@pytest.mark.parametrize("k", [0, 6])
def test_layer_in_range(k: int) -> None:
    with pytest.raises(ReductionError, match=rf"`k` must be in 1..5, as the model has 6 decoder layers .* found {k}"):
        Vtw(k=k).fit(SITE)


def test_grid_positions_cannot_be_renumbered() -> None:
    where = Site(12, signals=SITE.signals, depth=6, grid_positions=True)
    assert Vtw().fit(where).position == "keep"
    with pytest.raises(ReductionError, match="`position` must be keep"):
        Vtw(position="compact").fit(where)
