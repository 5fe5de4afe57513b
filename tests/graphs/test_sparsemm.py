"""SparseMM against loops written from the paper: capacities of heads, and what they keep."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.sparsemm import SparseMM, shared_out
from tests.graphs.oracle import Array, attention, best, grid

TOKENS, LAYERS, KV_HEADS, GROUP, TEXT = 40, 3, 2, 2, 6
SITE = Site(TOKENS, signals=frozenset({"head_attention", "behind"}), depth=LAYERS, kv_heads=KV_HEADS)


def written(path: Path, heads: int = KV_HEADS * GROUP, seed: int = 0) -> tuple[str, Array]:
    """A file of scores, two measurements each, and their means [layers, heads]."""
    scores = np.random.default_rng(seed).random((LAYERS, heads, 2)) ** 4
    data = {f"{layer}-{head}": scores[layer, head].tolist() for layer in range(LAYERS) for head in range(heads)}
    path.write_text(json.dumps(data))
    return str(path), scores.mean(-1)


@pytest.mark.parametrize(("keep", "reserved"), [(10, 0.1), (10, 0.55), (10, 1.0), (20, 0.0), (39, 0.1)])
def test_capacities_are_the_papers_and_exactly_the_budget(keep: int, reserved: float, tmp_path: Path) -> None:
    path, scores = written(tmp_path / "scores.json")
    method = SparseMM(keep=keep, scores=path, reserved=reserved).fit(SITE)
    found = [c for layer in range(LAYERS) for c in method.capacities(layer)]
    assert sum(found) == keep * LAYERS * KV_HEADS
    least = max(1, int(keep * reserved))
    assert least <= min(found) <= max(found) <= TOKENS
    share = scores.reshape(LAYERS * KV_HEADS, GROUP).sum(1)
    ideal = least + share / share.sum() * (keep - least) * len(found)
    if ideal.max() <= TOKENS:
        assert np.abs(np.array(found) - ideal).max() < 1
    else:
        assert found[int(share.argmax())] == TOKENS
    assert [method.kept(layer) for layer in range(LAYERS)] == [max(method.capacities(layer)) for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("scores", "total", "least", "most", "expected"),
    [
        ([1, 1, 1], 8, 1, 9, (3, 3, 2)),
        ([0, 0, 0], 6, 1, 9, (2, 2, 2)),
        ([8, 1, 1], 12, 1, 6, (6, 3, 3)),
        ([9, 8, 0, 0], 16, 1, 6, (6, 6, 2, 2)),
        ([1, 2], 10, 1, 5, (5, 5)),
        ([3, 1], 4, 2, 9, (2, 2)),
    ],
)
def test_sharing_out(scores: list[float], total: int, least: int, most: int, expected: tuple[int, ...]) -> None:
    assert shared_out(scores, total, least, most) == expected


@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
@pytest.mark.parametrize(("pool", "kernel"), [("average", 5), ("max", 7), ("max", 1)])
@pytest.mark.parametrize("window", [2, 32])
def test_against_the_paper(kind: str, pool: Any, kernel: int, window: int, tmp_path: Path) -> None:
    path, _ = written(tmp_path / "scores.json")
    method = SparseMM(keep=10, scores=path, pool=pool, kernel=kernel, window=window).fit(SITE)
    rows = attention(kind, (2, KV_HEADS, TEXT, TOKENS))
    behind = np.array([[50, 4, 3, 2, 1, 0], [-1, -1, 60, 2, 1, 0]])
    for layer in range(LAYERS):
        index = method.choose(layer, {"head_attention": torch.from_numpy(rows), "behind": torch.from_numpy(behind)})
        assert index.shape == (2, KV_HEADS, method.kept(layer))
        for b in range(2):
            asked = [t for t in range(TEXT) if 0 <= behind[b, t] < window]
            for h, room in enumerate(method.capacities(layer)):
                mean = [float(np.mean([rows[b, h, t, v] for t in asked])) for v in range(TOKENS)]
                scores = []
                for v in range(TOKENS):
                    near = mean[max(0, v - kernel // 2) : v + kernel // 2 + 1]
                    scores.append(grid(max(near) if pool == "max" else sum(near) / kernel, 1 / TOKENS))
                kept = sorted(best(scores, room))
                assert index[b, h].tolist() == kept + [-1] * (method.kept(layer) - room)


def test_without_scores_all_heads_have_the_same_room() -> None:
    method = SparseMM(keep=10).fit(SITE)
    assert [method.capacities(layer) for layer in range(LAYERS)] == [(10, 10)] * LAYERS
    assert method.fit(SITE) == method


def test_a_fitted_method_needs_no_file(tmp_path: Path) -> None:
    path, _ = written(tmp_path / "scores.json")
    method = SparseMM(keep=10, scores=path).fit(SITE)
    Path(path).unlink()
    assert method.scores is None
    assert method.fit(SITE) == method
    given = SparseMM(capacity_list=method.capacity_list).fit(SITE)
    assert given == method


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        ("nonsense", "holds something else than"),
        ("[1]", "holds something else than"),
        ('{"0-0": []}', "holds something else than"),
        ('{"0": [1]}', "holds 1 heads, expected"),
        ('{"0-0": [1], "1-0": [1], "2-0": [1]}', "holds 3 heads, expected"),
    ],
)
def test_files_that_do_not_fit(content: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ReductionError, match=f"`scores` {re.escape(str(path))} {says}"):
        SparseMM(keep=10, scores=str(path)).fit(SITE)


def test_scores_of_another_kind(tmp_path: Path) -> None:
    path, _ = written(tmp_path / "scores.json")
    data = json.loads(Path(path).read_text()) | {"1-1": [-0.5]}
    Path(path).write_text(json.dumps(data))
    with pytest.raises(ReductionError, match="holds scores that are negative or no numbers"):
        SparseMM(keep=10, scores=path).fit(SITE)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (SparseMM(), "give exactly one of `keep`"),
        (SparseMM(keep=4, kernel=4), "`kernel` must be odd"),
        (SparseMM(keep=4, window=0), "`window` must be at least 1"),
        (SparseMM(keep=4, reserved=1.5), "`reserved` is the part shared out equally, in 0..1; found 1.5"),
        (SparseMM(keep=4, kv_heads=3), "`kv_heads` must be 2, as the model has; found 3"),
        (SparseMM(capacity_list=(1, 2)), "needs 6 counts, one for each of 2 KV heads of 3 layers; found 2"),
        (SparseMM(capacity_list=(0, 2, 2, 2, 2, 2)), "must be in 1..40, .*; found 0 to 2"),
        (SparseMM(keep=9, capacity_list=(1, 2, 2, 2, 2, 2)), "says it all"),
    ],
)
def test_knobs_that_do_not_fit(method: SparseMM, says: str) -> None:
    with pytest.raises(ReductionError, match=says):
        method.fit(SITE)
