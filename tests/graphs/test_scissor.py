"""Scissor against union by flood fill."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.scissor import Scissor, components
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

N, FRAMES, DIM = 14, 3, 5
SITE = Site(N, FRAMES, (2, 7), frozenset({"hidden"}))


def run(method: Scissor, hidden: Array) -> tuple[Array, Array, Array]:
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is not None
    return out.tokens.numpy(), out.index.numpy(), out.size.numpy()


def largest(nodes: list[Any], tau: float, k: int) -> list[Any]:
    """nodes: (anchor, vector, tokens in it; 0 for one that only filled up). The same for the k largest components."""
    real = [i for i, node in enumerate(nodes) if node[2]]
    near = {i: [j for j in real if j == i or grid(cosine(nodes[i][1], nodes[j][1])) > tau * 4096] for i in real}
    found, seen = {}, set()
    for i in real:
        if i in seen:
            continue
        group, todo = {i}, [i]
        while todo:
            for j in near[todo.pop()]:
                if j not in group:
                    group.add(j)
                    todo.append(j)
        seen |= group
        head = min(group, key=lambda j: (-len(near[j]), j))
        vectors = [nodes[j][1] for j in sorted(group)]
        found[head] = (nodes[head][0], np.mean(vectors, 0), sum(nodes[j][2] for j in group))
    chosen = best([found[i][2] if i in found else 0 for i in range(len(nodes))], k)
    return [found.get(i, (nodes[i][0], nodes[i][1], 0)) for i in sorted(chosen)]


def one_sample(hidden: Any, method: Scissor) -> list[Any]:
    assert method.keep is not None
    assert method.per_frame is not None
    frames = [
        largest([(f * N + i, x.astype(np.float64), 1) for i, x in enumerate(frame)], method.tau, method.per_frame)
        for f, frame in enumerate(hidden)
    ]
    nodes = [node for frame in frames for node in frame]
    if len(hidden) > 1:
        nodes = largest(nodes, method.tau, method.keep)
    joined: list[list[Any]] = [[] for _ in nodes]
    for x in hidden.reshape(-1, DIM):
        joined[best([grid(cosine(x, node[1])) for node in nodes], 1)[0]].append(x)
    return [
        (anchor, (c + np.sum(group, 0)) / (1 + len(group)), max(1, len(group)))
        for (anchor, c, _), group in zip(nodes, joined, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, FRAMES])
@pytest.mark.parametrize("tau", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(("keep", "per_frame"), [(3, None), (9, 10), (14, None), (1, 1)])
def test_against_flood_fill(kind: str, frames: int, tau: float, keep: int, per_frame: int | None) -> None:
    per_frame = per_frame if frames > 1 else None
    method = Scissor(keep=keep, tau=tau, per_frame=per_frame).fit(dataclasses.replace(SITE, frames=frames))
    hidden = features(kind, (2, frames, N, DIM))
    tokens, index, size = run(method, hidden)
    for b in range(2):
        expected = one_sample(hidden[b], method)
        assert index[b].tolist() == [i for i, _, _ in expected]
        assert size[b].tolist() == [s for _, _, s in expected]
        np.testing.assert_allclose(tokens[b], np.stack([t for _, t, _ in expected]), atol=1e-5)


@pytest.mark.parametrize("n", [2, 3, 9, 40])
def test_a_chain_is_one_component(n: int) -> None:
    """Neighbours on a quarter circle: only each next pair is alike, the ends are at right angles."""
    angle = np.linspace(0, np.pi / 2, n)
    chain = torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32))[None]
    shuffled = chain[:, torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    tau = float(np.cos(angle[1])) - 1e-3
    if n > 2:
        assert tau > np.cos(angle[2])
    found = components(shuffled, torch.ones(1, n), tau, 1)
    assert found.weight.tolist() == [[n]]
    np.testing.assert_allclose(found.mean[0, 0], chain[0].mean(0), atol=1e-6)


def test_different_tokens_stay_as_they_are() -> None:
    hidden = features("random", (2, FRAMES, N, DIM))
    tokens, index, size = run(Scissor(keep_ratio=1, tau=0.999).fit(SITE), hidden)
    np.testing.assert_allclose(tokens, hidden.reshape(2, -1, DIM), atol=1e-6)
    assert (index == np.arange(FRAMES * N)).all()
    assert (size == 1).all()


def test_fitting() -> None:
    assert Scissor(keep=12).fit(SITE).per_frame == 8
    assert Scissor(keep=30).fit(SITE).per_frame == 14
    assert Scissor(keep=12).fit(dataclasses.replace(SITE, frames=1)).per_frame == 12
    assert Scissor(keep=12).space == "llm"
    with pytest.raises(ReductionError, match=r"`per_frame` must be in 9\.\.9, .* found 10"):
        Scissor(keep=9, per_frame=10).fit(dataclasses.replace(SITE, frames=1))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Scissor(keep=9, tau=1.0), r"`tau` is a cosine, in \[-1, 1\); found 1"),
        (Scissor(keep=9, per_frame=2), r"`per_frame` must be in 3\.\.14, .* found 2"),
        (Scissor(keep=9, per_frame=15), r"`per_frame` must be in 3\.\.14"),
        (Scissor(keep=43), "`keep` must be in 1..42, as there are 42 tokens in 3 frames"),
    ],
)
def test_refusals(method: Scissor, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
