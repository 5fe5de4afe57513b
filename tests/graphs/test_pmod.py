"""p-MoD's routing against a loop written from the official code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.pmod import PMoD
from tests.graphs.oracle import best, grid

DIM = 6
SITE = Site(20, frames=2, signals=frozenset({"hidden"}), depth=32, llm_dim=DIM)


@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_the_schedule(ratio: float) -> None:
    """mod_target_layers = "shiftedcos_decay_0.85_0.15": dense above the highest share, and int() of what stays."""
    method = PMoD(weights="-", ratio=ratio).fit(SITE)
    expected = {}
    for layer in range(32):
        share = math.cos(layer * math.pi / 31) / 2 + ratio
        if share <= 0.85:
            expected[layer] = math.trunc(40 * max(share, 0.15))
    assert dict(zip(method.layers, method.keep_list or (), strict=True)) == expected
    assert [method.kept(layer) for layer in method.layers] == list(expected.values())
    assert method.fit(SITE) == method
    assert method.after(SITE).total == (40 * (32 - len(expected)) + sum(expected.values())) // 32
    assert method.trained(SITE) == {"weight": (len(expected), DIM), "bias": (len(expected),)}


@pytest.mark.parametrize("kind", ["random", "equal"])
def test_choice_and_weight(kind: str) -> None:
    rng = np.random.default_rng(0)
    method = PMoD(weights="-").fit(SITE)
    weight, bias = rng.normal(size=(len(method.layers), DIM)), rng.normal(size=len(method.layers))
    hidden = rng.normal(size=(2, 40, DIM)) if kind == "random" else np.ones((2, 40, DIM))
    signals = {n: torch.from_numpy(x).float() for n, x in dict(hidden=hidden, weight=weight, bias=bias).items()}
    for row, layer in enumerate(method.layers):
        scores = (signals["hidden"] @ signals["weight"][row] + signals["bias"][row]).numpy()
        tokens, index, _ = method.forward(layer, signals)
        for b in range(2):
            assert index[b].tolist() == sorted(best([grid(s) for s in scores[b]], method.kept(layer)))
            assert torch.equal(tokens[b], signals["hidden"][b, index[b]])
        np.testing.assert_allclose(method.weight(layer, signals).numpy(), 1 + 0.2 * np.tanh(scores), rtol=1e-5)
        if kind == "equal":
            assert index[0].tolist() == list(range(method.kept(layer)))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(lowest=0.6), "`lowest` ≤ `ratio` ≤ `highest`"),
        (dict(highest=1.2), "`lowest` ≤ `ratio` ≤ `highest`"),
        (dict(position="compact"), "`position` must be keep"),
    ],
)
def test_refusals(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        PMoD(weights="-", **knobs).fit(SITE)  # type: ignore[arg-type]
