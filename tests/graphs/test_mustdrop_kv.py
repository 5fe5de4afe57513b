"""MustDrop's decoding stage against a loop written from the paper, ranks in place of thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.mustdrop_kv import MustDropKV
from tests.graphs.oracle import attention, best, grid

TEXT, TOKENS = 7, 24
SITE = Site(12, 2, (3, 4), frozenset({"text_attention", "instruction_mask"}), depth=6, kv_heads=2)
MASKS = np.array([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]], np.float32)


@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
@pytest.mark.parametrize(("keep", "ratio"), [(1, 1.1), (5, 0.0), (5, 3.0), (24, 1.1)])
def test_against_the_paper(kind: str, keep: int, ratio: float) -> None:
    rows = attention(kind, (3, TEXT, TOKENS))
    signals = {"text_attention": torch.from_numpy(rows), "instruction_mask": torch.from_numpy(MASKS)}
    index = MustDropKV(keep=keep, ratio=ratio).fit(SITE).choose(2, signals)
    for b in range(3):
        instruction = [t for t in range(TEXT) if MASKS[b, t]]
        paid = rows[b, instruction].astype(np.float64)
        units = [max(paid[:, v].sum() / paid.sum(), ratio * paid[:, v].max()) for v in range(TOKENS)]
        assert index[b].tolist() == sorted(best([grid(unit, 1 / TOKENS) for unit in units], keep))


def test_what_the_papers_thresholds_drop() -> None:
    """At thresholds in this ratio a token stays if it is above either: the same as that many by rank."""
    rows = attention("random", (1, TEXT, TOKENS)) ** 4
    paid = rows[0, 3:]
    share, most = paid.sum(0) / paid.sum(), paid.max(0)
    for individual in np.quantile(most, [0.3, 0.6, 0.9]) + 1e-6:
        stays = [v for v in range(TOKENS) if share[v] >= 1.2 * individual or most[v] >= individual]
        signals = {"text_attention": torch.from_numpy(rows), "instruction_mask": torch.from_numpy(MASKS[:1])}
        assert MustDropKV(keep=len(stays), ratio=1.2).fit(SITE).choose(2, signals).tolist() == [stays]


def test_text_before_the_image_has_no_say() -> None:
    rows = torch.zeros(1, 2, TOKENS)
    rows[0, 0, 3], rows[0, 1, 9] = 0.9, 0.1
    signals = {"text_attention": rows, "instruction_mask": torch.tensor([[0.0, 1.0]])}
    assert MustDropKV(keep=1).fit(SITE).choose(2, signals).tolist() == [[9]]


@pytest.mark.parametrize(("depth", "layer"), [(32, 2), (2, 1)])
def test_the_papers_place_and_count(depth: int, layer: int) -> None:
    site = Site(576, signals=SITE.signals, depth=depth)
    method = MustDropKV().fit(site)
    assert (method.start, method.shared, method.kept(layer)) == (layer, True, 64)
    assert method.fit(site) == method
    with pytest.raises(ReductionError, match="`ratio` is at least 0; found -1"):
        MustDropKV(ratio=-1.0).fit(site)
