"""MADTP's untrained part against a loop over patches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.madtp import Madtp
from tests.graphs.oracle import KINDS, Array, attention, best, features, grid

N, DIM = 24, 8
SITE = Site(N, 2, (4, 6), frozenset({"hidden", "size", "attention", "cls", "cls_attention"}), depth=3)


def reduce(method: Madtp, block: int, signals: dict[str, Any]) -> Reduced:
    return method.reduce_frame(block, {k: torch.from_numpy(v) for k, v in signals.items()}, 1)


def one_block(hidden: Array, maps: Array, size: Array, r: int) -> list[Any]:
    """(index, token, size) per token that is left."""
    patches = range(1, len(hidden))
    received = {j: sum(float(maps[i, j]) for i in patches) for j in patches}
    importance = {j: (received[j] / sum(received.values()) + float(maps[0, j])) / 2 for j in patches}
    ranked = [patches[i] for i in best([grid(importance[j], 1 / len(patches)) for j in patches], len(patches))]
    stays, rest = ranked[: len(patches) - r - 1], ranked[len(patches) - r - 1 :]
    blend = sum(importance[j] * hidden[j].astype(np.float64) for j in rest) / sum(importance[j] for j in rest)
    out = [(j, hidden[j], float(size[j])) for j in [0, *sorted(stays)]]
    return [*out, (rest[0], blend, sum(float(size[j]) for j in rest))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("knobs", [{"keep": 2}, {"keep": 9}, {"keep": 23}, {"schedule": (0, 5, 17)}])
def test_against_the_paper_block_by_block(kind: str, knobs: dict[str, Any]) -> None:
    method = Madtp(**knobs).fit(SITE)
    assert method.schedule is not None and method.keep is not None
    hidden, size = features(kind, (2, N + 1, DIM)), np.ones((2, N + 1), np.float32)
    for block in method.blocks:
        n = hidden.shape[1]
        maps = attention(kind, (2, n, n), block)
        given = {"hidden": hidden, "size": size, "attention": maps, "cls_attention": maps[:, 0]}
        out = reduce(method, block, given)
        assert out.size is not None
        for b in range(2):
            expected = one_block(hidden[b], maps[b], size[b], method.schedule[block])
            assert out.index[b].tolist() == [i for i, _, _ in expected]
            assert out.size[b].tolist() == [s for _, _, s in expected]
            np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([t for _, t, _ in expected]), atol=1e-5)
        hidden, size = out.tokens.numpy(), out.size.numpy()
    assert hidden.shape == (2, method.keep + 1, DIM)
    assert (size.sum(1) == N + 1).all()


def test_float16_accumulates_in_float32() -> None:
    maps = attention("random", (1, N + 1, N + 1)).astype(np.float16)
    given: dict[str, Any] = {"attention": maps, "cls_attention": maps[:, 0], "size": np.ones((1, N + 1), np.float32)}
    given["hidden"] = features("random", (1, N + 1, DIM)).astype(np.float16)
    method = Madtp(keep=5).fit(dataclasses.replace(SITE, depth=1))
    out, wide = reduce(method, 0, given), reduce(method, 0, given | {"hidden": given["hidden"].astype(np.float32)})
    assert out.tokens.dtype == torch.float16
    torch.testing.assert_close(out.tokens.float(), wide.tokens, rtol=1e-3, atol=1e-3)


def test_knobs() -> None:
    fitted = Madtp(keep_ratio=0.5).fit(SITE)
    assert (fitted.keep, fitted.schedule, fitted.position) == (12, (4, 4, 4), "compact")
    assert fitted.fit(SITE) == fitted
    assert fitted.after(SITE) == Site(12, 2, None, frozenset({"hidden", "cls"}), 3)
    assert fitted.merges and not fitted.proportional
    assert Madtp(keep=N).fit(SITE).blocks == ()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Madtp(), "exactly one of `keep`"),
        (Madtp(keep=1), "`keep` must be at least 2: no fewer can stay; found 1"),
        (Madtp(schedule=(20, 3, 0)), r"may remove 0..2 of the 4 that reach block 1; found 3"),
    ],
)
def test_refusals(method: Madtp, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
