"""DivPrune against a loop over distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.divprune import DivPrune
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

N, FRAMES, DIM = 21, 2, 8
SITE = Site(N, FRAMES, (3, 7), frozenset({"hidden"}))


def run(method: DivPrune, hidden: Array) -> tuple[Array, Array]:
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is None
    return out.tokens.numpy(), out.index.numpy()


def chosen(x: Array, keep: int, per_step: int) -> list[int]:
    """In the order of choice."""
    n = len(x)
    distance = [[-grid(cosine(a, b)) for b in x] for a in x]
    out = best([min([distance[i][j] for j in range(n) if j != i], default=0) for i in range(n)], 1)
    while len(out) < keep:
        rest = [i for i in range(n) if i not in out]
        farthest = best([min(distance[i][j] for j in out) for i in rest], min(per_step, keep - len(out)))
        out += [rest[i] for i in farthest]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 2, 7, 20])
@pytest.mark.parametrize("per_step", [1, 3])
def test_against_the_definition(kind: str, keep: int, per_step: int) -> None:
    hidden = features(kind, (2, FRAMES, N, DIM))
    tokens, index = run(DivPrune(keep=keep, per_step=per_step).fit(SITE), hidden)
    for b in range(2):
        expected = [i + f * N for f in range(FRAMES) for i in sorted(chosen(hidden[b, f], keep, per_step))]
        assert index[b].tolist() == expected
        assert (tokens[b] == hidden[b].reshape(-1, DIM)[expected]).all()


def test_of_three_prototypes_one_each_comes_first() -> None:
    hidden = features("ties", (1, 1, N, DIM))
    tokens, _ = run(DivPrune(keep=3).fit(Site(N, 1, None, SITE.signals)), hidden)
    assert len(np.unique(tokens[0], axis=0)) == 3


def test_length_does_not_matter() -> None:
    hidden = features("random", (2, FRAMES, N, DIM))
    stretched = hidden * np.exp(features("random", (2, FRAMES, N, 1), 5))
    method = DivPrune(keep=6).fit(SITE)
    assert (run(method, hidden)[1] == run(method, stretched)[1]).all()


def test_zero_tokens_are_chosen_once() -> None:
    hidden = np.zeros((1, FRAMES, N, DIM), np.float32)
    assert run(DivPrune(keep=3).fit(SITE), hidden)[1].tolist() == [[0, 1, 2, N, N + 1, N + 2]]


@pytest.mark.parametrize("tokens", [1, N])
def test_keeping_all_is_the_identity(tokens: int) -> None:
    hidden = features("random", (2, FRAMES, tokens, DIM))
    kept, index = run(DivPrune(keep_ratio=1).fit(Site(tokens, FRAMES, None, SITE.signals)), hidden)
    assert (kept == hidden.reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * tokens)).all()


def test_space_and_refusals() -> None:
    assert DivPrune(keep=4).space == "llm"
    assert DivPrune(keep=4, space="tower").space == "tower"
    with pytest.raises(ReductionError, match=r"`per_step` .* at least 1; found 0"):
        DivPrune(keep=4, per_step=0).fit(SITE)
    with pytest.raises(ReductionError, match="`space` takes tower or llm; found 'both'"):
        DivPrune(keep=4, space="both").fit(SITE)  # type: ignore[arg-type]
