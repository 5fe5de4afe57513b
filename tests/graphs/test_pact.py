"""PACT against a loop over tokens, written from the paper, with a fixed number of centres."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.pact import PACT
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

N, DIM, HEADS, KV, HEAD_DIM = 22, 8, 4, 2, 6
NEEDS = ("next_plain_queries", "next_plain_keys", "next_keys")
SITE = Site(11, 2, None, frozenset({"hidden", "size", *NEEDS}), depth=32)


def given(kind: str, seed: int = 0) -> dict[str, Array]:
    queries, plain, keys = (
        features(kind, (2, N, heads * HEAD_DIM), seed + i).reshape(2, N, heads, HEAD_DIM).transpose(0, 2, 1, 3).copy()
        for i, heads in enumerate((HEADS, KV, KV))
    )
    hidden = features(kind, (2, N, DIM), seed + 3)
    size = np.random.default_rng(seed).integers(1, 4, (2, N)).astype(np.float32)
    return {"hidden": hidden, "size": size, **dict(zip(NEEDS, (queries, plain, keys), strict=True))}


def reduce(method: PACT, signals: dict[str, Array]) -> Reduced:
    return method.forward(method.layers[0], {k: torch.from_numpy(v) for k, v in signals.items()})


def expected(method: PACT, s: dict[str, Array]) -> list[tuple[int, Any, float]]:
    """(centre, token, size) of one sample."""
    assert method.keep is not None
    hidden, queries, plain, keys = (s[name].astype(np.float64) for name in ("hidden", *NEEDS))
    lengths = [math.sqrt(float((h * h).sum())) for h in hidden]
    importance = [0.0] * N
    for head in range(HEADS):
        query = queries[head].mean(0)
        logits = [float(query @ plain[head // (HEADS // KV), i]) / math.sqrt(HEAD_DIM) for i in range(N)]
        total = sum(map(math.exp, logits))
        for i in range(N):
            importance[i] += math.exp(logits[i]) / total / HEADS * lengths[i] / max(lengths)
    survivors = sorted(best([grid(x, 1 / N) for x in importance], max(method.keep, math.floor(method.share * N))))

    joint = [np.concatenate([keys[head, i] for head in range(KV)]).astype(np.float32) for i in range(N)]
    distance = [[4096 - grid(cosine(a, b)) for b in joint] for a in joint]
    density = {
        i: grid(sum(math.exp(-((distance[i][j] / 4096 / 2) ** 2)) for j in survivors), len(survivors))
        for i in survivors
    }
    delta = {}
    for i in survivors:
        denser = [j for j in survivors if (density[j], -j) > (density[i], -i)]
        everywhere = [distance[a][b] for a in survivors for b in survivors]
        delta[i] = min((distance[i][j] for j in denser), default=max(everywhere))
    peaks = best([density[i] * delta[i] for i in survivors], method.keep)
    centres = sorted(survivors[p] for p in peaks)

    groups: dict[int, list[int]] = {c: [c] for c in centres}
    for i in range(N):
        near = min(centres, key=lambda c: (distance[i][c], c))
        if i not in centres and (i in survivors or distance[i][near] <= method.coef * method.cutoff * 4096):
            groups[near].append(i)
    out = []
    for c, group in groups.items():
        weight = sum(float(s["size"][i]) for i in group)
        out.append((c, sum(float(s["size"][i]) * hidden[i] for i in group) / weight, weight))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "knobs",
    [
        {"keep": 6},
        {"keep": 4, "share": 0.8, "cutoff": 0.6},
        {"keep": 15, "cutoff": 0.4, "coef": 1.0},
        {"keep": 1, "share": 1.0},
    ],
)
def test_against_the_paper(kind: str, knobs: dict[str, Any]) -> None:
    method = PACT(**knobs).fit(SITE)
    signals = given(kind)
    out = reduce(method, signals)
    assert out.size is not None
    for b in range(2):
        wanted = expected(method, {k: v[b] for k, v in signals.items()})
        assert out.index[b].tolist() == [c for c, _, _ in wanted]
        assert out.size[b].tolist() == [w for _, _, w in wanted]
        np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([t for _, t, _ in wanted]), atol=1e-5)


def test_pruned_tokens_come_back_only_if_they_are_near() -> None:
    signals = given("random")
    total = float(signals["size"][0].sum())
    everything = reduce(PACT(keep=4, cutoff=2.0).fit(SITE), signals).size
    nothing = reduce(PACT(keep=4, cutoff=0.0).fit(SITE), signals).size
    assert everything is not None and nothing is not None
    assert everything[0].sum() == total
    assert nothing[0].sum() < total


def test_merging_equal_tokens_changes_nothing() -> None:
    signals = given("random") | {"hidden": features("equal", (2, N, DIM))}
    out = reduce(PACT(keep=5).fit(SITE), signals)
    np.testing.assert_allclose(out.tokens.numpy(), signals["hidden"][:, :5], rtol=1e-6)


def test_all_stay_as_they_are() -> None:
    signals = given("random")
    out = reduce(PACT(keep=N).fit(SITE), signals)
    assert out.size is not None
    assert out.index.tolist() == [list(range(N))] * 2
    assert np.array_equal(out.size.numpy(), signals["size"])
    np.testing.assert_allclose(out.tokens.numpy(), signals["hidden"], rtol=1e-6)


def test_knobs() -> None:
    fitted = PACT().fit(SITE)
    assert (fitted.layer, fitted.keep, fitted.position) == (4, 6, "keep")
    assert fitted.fit(SITE) == fitted
    assert fitted.after(SITE) == Site(6, 1, None, SITE.signals, 32)
    assert fitted.merges and fitted.sized


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PACT(layer=0), r"`layer` must be in 1..31"),
        (PACT(keep=23), r"`keep` must be in 1..22"),
        (PACT(share=0.0), r"`share` is what survives the pruning, in \(0, 1\]; found 0"),
        (PACT(cutoff=-1.0), r"`cutoff` and `coef` are at least 0; found -1 and 1.5"),
    ],
)
def test_refusals(method: PACT, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
