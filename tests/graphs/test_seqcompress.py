"""k-means against a loop over tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.seqcompress import SeqCompress
from graphs.uniform import grid as places
from tests.graphs.oracle import KINDS, Array, features, grid

N, FRAMES, DIM = 24, 2, 8
SITE = Site(N, FRAMES, (4, 6), frozenset({"hidden"}))


def run(method: SeqCompress, hidden: Array) -> tuple[Array, Array, Array]:
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is not None
    return out.tokens.numpy(), out.index.numpy(), out.size.numpy()


def one_frame(x: Any, keep: int, steps: int, rows: int) -> tuple[Any, list[int], list[int]]:
    x = x.astype(np.float64)
    start = places(rows, N // rows, keep)
    centre = [x[i] for i in start]
    unit = (x**2).sum(-1).mean()
    for _ in range(steps):
        groups: list[list[int]] = [[] for _ in start]
        for i in range(N):
            # Up to ‖x‖², which is the same for all centres, the negative squared distance.
            near = [grid((x[i] ** 2).sum() - ((x[i] - c) ** 2).sum(), unit) for c in centre]
            groups[near.index(max(near))].append(i)
        centre = [x[g].mean(0) if g else c for g, c in zip(groups, centre, strict=True)]
    return np.stack(centre), start, [max(1, len(g)) for g in groups]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 5, 11, N])
@pytest.mark.parametrize(("steps", "rows"), [(5, None), (1, 1), (2, 2)])
def test_against_the_definition(kind: str, keep: int, steps: int, rows: int | None) -> None:
    method = SeqCompress(keep=keep, steps=steps, rows=rows).fit(SITE)
    assert method.rows is not None
    hidden = features(kind, (2, FRAMES, N, DIM))
    tokens, index, size = run(method, hidden)
    for b in range(2):
        frames = [one_frame(hidden[b, f], keep, steps, method.rows) for f in range(FRAMES)]
        np.testing.assert_allclose(tokens[b], np.concatenate([f[0] for f in frames]), atol=1e-5)
        assert index[b].tolist() == [i + f * N for f, (_, start, _) in enumerate(frames) for i in start]
        assert size[b].tolist() == [s for f in frames for s in f[2]]


def test_three_prototypes_are_found_exactly() -> None:
    hidden = features("ties", (1, 1, N, DIM))
    tokens, _, size = run(SeqCompress(keep=12).fit(dataclasses.replace(SITE, frames=1)), hidden)
    assert len(np.unique(np.round(tokens[0], 4), axis=0)) == len(np.unique(np.round(hidden[0, 0], 4), axis=0)) == 3
    assert (size > 1).sum() == 3


def test_keeping_all_different_tokens_is_the_identity() -> None:
    hidden = features("random", (2, FRAMES, N, DIM))
    tokens, index, size = run(SeqCompress(keep_ratio=1).fit(SITE), hidden)
    assert (tokens == hidden.reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()
    assert (size == 1).all()


def test_without_a_raster_and_refusals() -> None:
    assert SeqCompress(keep=4).fit(dataclasses.replace(SITE, grid=None)).rows == 1
    assert SeqCompress(keep=4).space == "llm"
    with pytest.raises(ReductionError, match="`steps` must be at least 1; found 0"):
        SeqCompress(keep=4, steps=0).fit(SITE)
    with pytest.raises(ReductionError, match="`rows` must divide the 24 tokens of a frame; found 5"):
        SeqCompress(keep=4, rows=5).fit(SITE)
