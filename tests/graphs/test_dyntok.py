"""DynTok against a loop over rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.dyntok import DynTok
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

H, W, FRAMES, DIM = 3, 5, 4, 6
SITE = Site(H * W, FRAMES, (H, W), frozenset({"hidden"}))


def run(method: DynTok, hidden: Array) -> tuple[Array, Array, Array]:
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is not None
    return out.tokens.numpy(), out.index.numpy(), out.size.numpy()


def runs(x: Array, keep: int) -> list[list[int]]:
    """Runs of x [frames · tokens, dim]."""
    heads = [i for i in range(len(x)) if i % W == 0]
    others = [i for i in range(len(x)) if i % W]
    heads += [others[j] for j in best([-grid(cosine(x[i], x[i - 1])) for i in others], keep - len(heads))]
    out: list[list[int]] = []
    for i in range(len(x)):
        if i in heads:
            out.append([])
        out[-1].append(i)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", ["clip", "frame"])
@pytest.mark.parametrize("keep", [12, 20, 44, 60])
def test_against_the_definition(kind: str, budget: Any, keep: int) -> None:
    method = DynTok(keep=keep, budget=budget).fit(SITE)
    assert method.after(SITE).total == keep
    hidden = features(kind, (2, FRAMES, H * W, DIM))
    tokens, index, size = run(method, hidden)
    for b in range(2):
        x = hidden[b].reshape(-1, DIM)
        if budget == "clip":
            expected = runs(x, keep)
        else:
            expected = [[i + f * H * W for i in r] for f in range(FRAMES) for r in runs(hidden[b, f], keep // FRAMES)]
        assert index[b].tolist() == [r[0] for r in expected]
        assert size[b].tolist() == [len(r) for r in expected]
        np.testing.assert_allclose(tokens[b], np.stack([x[r].mean(0) for r in expected]), atol=1e-6)
    assert (size.sum(1) == H * W * FRAMES).all()


def test_busy_frames_get_the_budget() -> None:
    hidden = features("random", (1, FRAMES, H * W, DIM))
    hidden[:, 0] = hidden[:, 0, :1]
    index = run(DynTok(keep=12 + 36).fit(SITE), hidden)[1][0]
    assert (index < H * W).sum() == H, "a plain frame is left with its rows"


def test_keeping_all_is_the_identity() -> None:
    hidden = features("random", (2, FRAMES, H * W, DIM))
    tokens, index, size = run(DynTok(keep_ratio=1).fit(SITE), hidden)
    assert (tokens == hidden.reshape(2, -1, DIM)).all()
    assert (index == np.arange(60)).all()
    assert (size == 1).all()


def test_a_ratio_per_frame() -> None:
    fitted = DynTok(keep_ratio=0.5, budget="frame").fit(SITE)
    assert (fitted.keep, fitted.rows) == (FRAMES * 8, H)
    assert fitted.fit(SITE) == fitted


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (DynTok(keep=11), SITE, "`keep` must be at least 12, .* 3 rows of 4 frames starts a run; found 11"),
        (DynTok(keep=18, budget="frame"), SITE, "each of 4 frames the same share; found `keep` = 18"),
        (DynTok(keep=20), dataclasses.replace(SITE, grid=None), "raster"),
    ],
)
def test_refusals(method: DynTok, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
