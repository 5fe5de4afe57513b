"""LOOK-M against loops written from the paper: what every KV head keeps, and what becomes of the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import Site
from graphs.lookm import LookM
from tests.graphs.oracle import Array, attention, best, cosine, features, grid

TOKENS, HEADS, DIM = 18, 2, 6
SITE = Site(TOKENS, signals=frozenset({"received"}), depth=4, kv_heads=HEADS)


def merged(mode: str, rows: Array, keys: Array, kept: list[int]) -> Array:
    """Rows [tokens, dim] of the kept, by a loop over those that go."""
    guests: dict[int, list[int]] = {k: [] for k in kept}
    for t in sorted(set(range(len(keys))) - set(kept)):
        near = best([grid(cosine(keys[t], keys[k])) for k in kept], 1)[0]
        guests[kept[near]].append(t)
    out = []
    for k in kept:
        own = rows[k].astype(np.float64)
        came = [rows[t].astype(np.float64) for t in guests[k]]
        if mode == "pivot":
            came = [(own + other) / 2 for other in came]
        out.append(own if mode == "none" else np.mean([own, *came], axis=0))
    return np.array(out, np.float32)


@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
@pytest.mark.parametrize("mode", ["pivot", "average", "none"])
@pytest.mark.parametrize("keep", [1, 5, 18])
def test_against_the_paper(kind: str, mode: str, keep: int) -> None:
    received = 3 * attention(kind, (2, HEADS, TOKENS))
    keys, values = features(kind, (2, HEADS, TOKENS, DIM)), features("random", (2, HEADS, TOKENS, DIM), 1)
    method = LookM(keep=keep, mode=mode).fit(SITE)  # type: ignore[arg-type]
    index = method.choose(0, {"received": torch.from_numpy(received)})
    found = method.merge(torch.from_numpy(keys), torch.from_numpy(values), index)
    for b in range(2):
        for h in range(HEADS):
            kept = sorted(best([grid(s) for s in received[b, h]], keep))
            assert index[b, h].tolist() == kept
            for out, rows in zip(found, (keys, values), strict=True):
                np.testing.assert_allclose(out[b, h], merged(mode, rows[b, h], keys[b, h], kept), atol=1e-5)
    assert method.merges == (mode != "none")


def test_tokens_that_are_alike_become_one_of_them() -> None:
    keys = torch.ones(1, 1, 6, 4)
    values = torch.arange(6.0)[None, None, :, None].expand(-1, -1, -1, 4)
    index = torch.tensor([[[2, 4]]])
    key, value = LookM(keep=2).fit(SITE).merge(keys, values, index)
    assert torch.equal(key, keys[:, :, :2]), "the mean of equal keys"
    expected = (2 + sum((2 + v) / 2 for v in (0, 1, 3, 5))) / 5
    assert torch.allclose(value[0, 0, :, 0], torch.tensor([expected, 4.0])), "among equals the earlier takes all"


def test_half_precision_is_kept_and_summed_in_float32() -> None:
    keys = torch.full((1, 1, 4096, 4), 1.5, dtype=torch.float16)
    index = torch.tensor([[[0]]])
    key, _ = LookM(keep=1, mode="average").fit(Site(4096, signals=SITE.signals, depth=2)).merge(keys, keys, index)
    assert key.dtype == torch.float16
    assert torch.equal(key, keys[:, :, :1])


def test_the_papers_fifth_of_every_layer() -> None:
    method = LookM().fit(Site(576, signals=SITE.signals, depth=32))
    assert (method.start, method.shared, method.per_head) == (0, False, True)
    assert {method.kept(layer) for layer in range(32)} == {115}
