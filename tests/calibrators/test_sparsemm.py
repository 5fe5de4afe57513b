"""The scores of heads: where a question points, and that the trained model has heads that look there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from exporter.embedded import CHECKPOINT, digits, heads
from graphs._contract import Site
from graphs.sparsemm import SparseMM


def test_the_cell_is_where_the_digit_is() -> None:
    side, patch = 8, digits.IMAGE // 8
    for example in digits.held_out("cell", 20):
        tokens = heads.cell(example.question, side)
        mask = np.zeros((side, side), bool)
        mask.reshape(-1)[tokens] = True
        pixels = example.frames[0, ..., 0] > 0
        inked = pixels.reshape(side, patch, side, patch).any((1, 3))
        assert len(set(tokens)) == 4
        assert inked[mask].any(), "an asked cell holds a digit"


def test_some_heads_look_at_what_is_asked_and_get_more_of_the_cache(tmp_path: Path) -> None:
    found = heads.scores(CHECKPOINT, 10)
    shares = {head: share for head, (share,) in found.items()}
    assert set(shares) == {f"{layer}-{head}" for layer in range(4) for head in range(4)}
    assert all(0 <= share <= 1 for share in shares.values())
    assert max(shares.values()) >= 0.8
    assert min(shares.values()) <= 0.2
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(found))
    site = Site(64, signals=frozenset({"head_attention", "behind"}), depth=4, kv_heads=2)
    method = SparseMM(keep=16, scores=str(path)).fit(site)
    rooms = {(layer, head): method.capacities(layer)[head] for layer in range(4) for head in range(2)}
    seen = {key: shares[f"{key[0]}-{2 * key[1]}"] + shares[f"{key[0]}-{2 * key[1] + 1}"] for key in rooms}
    assert rooms[max(seen, key=seen.__getitem__)] == max(rooms.values()) > 16
    assert rooms[min(seen, key=seen.__getitem__)] == min(rooms.values()) < 16
