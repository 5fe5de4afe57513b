"""FiCoCo-L against a loop over tokens, written from the paper's three steps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.ficoco_l import FiCoCoL
from tests.graphs.oracle import KINDS, Array, attention, best, features, grid

N, DIM, TEXT = 26, 8, 5
NEEDS = ("visual_attention", "text_attention", "instruction_mask")
SITE = Site(13, 2, None, frozenset({"hidden", "size", *NEEDS, *(f"plain_{n}" for n in NEEDS[:2])}), depth=5)
MASK = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], np.float32)


def given(kind: str, hidden: Array, size: Array, seed: int) -> dict[str, Array]:
    """Signals of a causal decoder: visual tokens see those before them, text sees some of itself too."""
    n = hidden.shape[1]
    among = np.tril(attention(kind, (2, n, n), seed)) + np.eye(n, dtype=np.float32) / n
    among[:, :, 0] += np.arange(n) / n**2
    from_text = attention("random" if kind == "frozen" else kind, (2, TEXT, n), seed + 1) * 0.7
    return {
        "hidden": hidden,
        "size": size,
        "visual_attention": (among / among.sum(-1, keepdims=True)).astype(np.float32),
        "text_attention": from_text.astype(np.float32),
        "instruction_mask": MASK,
    }


def reduce(method: FiCoCoL, layer: int, signals: dict[str, Array]) -> Reduced:
    return method.forward(layer, {k: torch.from_numpy(v) for k, v in signals.items()})


def one_layer(s: dict[str, Array], r: int, method: FiCoCoL) -> list[tuple[int, Any, float]]:
    """(index, token, size) per token that is left of one sample."""
    hidden, size, among, from_text, mask = (s[k].astype(np.float64) for k in ("hidden", "size", *NEEDS))
    n = len(hidden)
    asks = [k for k in range(TEXT) if mask[k]]
    redundant = []
    for j in range(n):
        seen = sum(among[i, j] for i in range(n)) / n
        asked = sum(from_text[k, j] for k in asks) / len(asks)
        redundant.append(grid(method.beta * seen - (1 - method.beta) * asked, 1 / n))
    goes = sorted(best(redundant, r))
    stays = [j for j in range(n) if j not in goes]
    count = min(len(stays), max(1, math.ceil(n * (1 - method.quantile) - 1e-9)))
    flows: dict[int, list[tuple[int, float]]] = {j: [] for j in stays}
    for i in goes:
        to = {}
        for j in stays:
            through = sum(from_text[k, i] * from_text[k, j] for k in asks)
            to[j] = method.gamma * (among[i, j] + among[j, i]) + (1 - method.gamma) * through
        targets = [stays[k] for k in best([grid(to[j], 1 / n) for j in stays], count)]
        total = sum(math.exp(to[j]) for j in targets)
        weights = {j: round(math.exp(to[j]) / total * 256) / 256 for j in targets}
        weights[targets[0]] += 1 - sum(weights.values())
        for j in targets:
            flows[j].append((i, weights[j]))
    out = []
    for j in stays:
        token = (hidden[j] + sum(w * hidden[i] for i, w in flows[j])) / (1 + sum(w for _, w in flows[j]))
        out.append((j, token, float(size[j] + sum(w * size[i] for i, w in flows[j]))))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "knobs",
    [
        {"keep": 9},
        {"keep": 2, "quantile": 0.8, "beta": 0.2},
        {"keep": 19, "beta": 1.0, "gamma": 0.1, "layer": 3},
        {"schedule": (0, 3, 0, 12, 9), "quantile": 0.5, "gamma": 1.0},
    ],
)
def test_against_the_paper_layer_by_layer(kind: str, knobs: dict[str, Any]) -> None:
    method = FiCoCoL(**knobs).fit(SITE)
    assert method.schedule is not None and method.keep is not None
    hidden, size = features(kind, (2, N, DIM)), np.full((2, N), 2, np.float32)
    for layer in method.layers:
        signals = given(kind, hidden, size, layer)
        out = reduce(method, layer, signals)
        assert out.size is not None
        assert out.index.shape == (2, method.kept(layer))
        for b in range(2):
            expected = one_layer({k: v[b] for k, v in signals.items()}, method.schedule[layer], method)
            assert out.index[b].tolist() == [i for i, _, _ in expected]
            np.testing.assert_allclose(out.size[b].numpy(), [s for _, _, s in expected], rtol=1e-5)
            np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([t for _, t, _ in expected]), atol=1e-5)
        hidden, size = out.tokens.numpy(), out.size.numpy()
    assert hidden.shape == (2, method.keep, DIM)
    np.testing.assert_allclose(size.sum(1), 2 * N, rtol=1e-5)


def test_merging_equal_tokens_changes_nothing() -> None:
    hidden = features("equal", (2, N, DIM))
    out = reduce(FiCoCoL(keep=8).fit(SITE), 1, given("random", hidden, np.ones((2, N), np.float32), 0))
    np.testing.assert_allclose(out.tokens.numpy(), hidden[:, : out.index.shape[1]], rtol=1e-5)


def test_text_in_front_and_padding_have_no_say() -> None:
    signals = given("random", features("random", (2, N, DIM)), np.ones((2, N), np.float32), 0)
    method = FiCoCoL(keep=8).fit(SITE)
    other = signals["text_attention"].copy()
    other[:, 0] = other[0, 1] = attention("ties", (N,), 7)
    a, b = (reduce(method, 1, signals | {"text_attention": t}) for t in (signals["text_attention"], other))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None)


def test_without_rope_the_same_from_other_signals() -> None:
    signals = given("random", features("random", (2, N, DIM)), np.ones((2, N), np.float32), 0)
    plain = {f"plain_{name}" if "attention" in name else name: value for name, value in signals.items()}
    a = reduce(FiCoCoL(keep=8).fit(SITE), 1, signals)
    b = reduce(FiCoCoL(keep=8, rope=False).fit(SITE), 1, plain)
    assert torch.equal(a.index, b.index) and torch.equal(a.tokens, b.tokens)


def test_knobs() -> None:
    fitted = FiCoCoL(keep_ratio=0.5).fit(SITE)
    assert (fitted.layer, fitted.keep, fitted.schedule, fitted.position) == (1, 13, (0, 4, 3, 3, 3), "keep")
    assert (fitted.layers, [fitted.kept(layer) for layer in fitted.layers]) == ((1, 2, 3, 4), [22, 19, 16, 13])
    assert fitted.fit(SITE) == fitted
    assert fitted.after(SITE) == Site(13, 1, None, SITE.signals, 5)
    assert fitted.merges and not fitted.sized
    everything = FiCoCoL(keep=N).fit(SITE)
    assert everything.layers == () and everything.fit(SITE) == everything
    assert FiCoCoL().fit(SITE).keep == 7
    paper = FiCoCoL(keep=464).fit(dataclasses.replace(SITE, tokens=576, frames=1, depth=32))
    assert paper.schedule == (0,) * 4 + (4,) * 28


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FiCoCoL(keep=27), r"`keep` must be in 1..26"),
        (FiCoCoL(layer=5), r"`layer` must be in 1..4"),
        (FiCoCoL(beta=1.5), r"`beta`, `gamma` and `quantile` are in 0..1; found 1.5, 0.6 and 0.998"),
        (
            FiCoCoL(schedule=(1, 2, 3)),
            r"`schedule` takes one number for each of the 5 decoder layers, .* found 1\+2\+3",
        ),
        (FiCoCoL(schedule=(0, 0, 20, 0, 6)), r"together less than the 26 visual tokens"),
        (FiCoCoL(schedule=(0, 0, 20, 0, 2), keep=5), r"this `schedule` keeps 4 of 26 tokens; leave out `keep` = 5"),
        (FiCoCoL(schedule=(0, 0, 20, 0, 2), keep_ratio=0.5), r"leave out `keep_ratio` = 0.5"),
        (FiCoCoL(schedule=(0, 0, 20, 0, 2), layer=3), r"this `schedule` begins before layer 2; leave out `layer` = 3"),
    ],
)
def test_refusals(method: FiCoCoL, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
