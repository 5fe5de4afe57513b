"""CDPruner against determinants: the chosen token is the one that adds most to the volume."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphs._contract import ReductionError
from graphs.cdpruner import CDPruner
from tests.graphs.oracle import GUIDED, GUIDED_BY_CLIP, KINDS, Array, best, cosine, grid, guided, run

N, FRAMES, DIM = GUIDED.tokens, GUIDED.frames, 24
LLM, CLIP = GUIDED, GUIDED_BY_CLIP


def kernel(given: dict[str, Array], relevance: str, b: int, f: int) -> Any:
    x = given["hidden"][b, f]
    if relevance == "clip":
        r = [-grid(cosine(a, given["aligned_text"][b])) / 4096 for a in given["aligned"][b, f]]
    else:
        text = given["text"][b][given["text_mask"][b] > 0].mean(0)
        r = [grid(cosine(a, text)) / 4096 for a in x]
    low, high = min(r), max(r)
    r = [(v - low + 1e-6) / (high - low) if high > low else 1.0 for v in r]
    return np.array([[r[i] * cosine(x[i], x[j]) * r[j] for j in range(len(x))] for i in range(len(x))])


def left(variance: float) -> int:
    return grid(variance) if grid(variance) >= 16 else 0


def greedy(L: Any, keep: int) -> list[int]:
    """What a token adds is det(L[S + i]) / det(L[S]), by least squares on the tokens that span something new."""
    basis: list[int] = []
    out: list[int] = []
    for _ in range(keep):
        gain = []
        for i in range(len(L)):
            inner = L[np.ix_(basis, basis)]
            explained = L[i, basis] @ np.linalg.solve(inner, L[basis, i]) if basis else 0.0
            gain.append(left(L[i, i] - explained) if i not in out else -(10**6))
        i = best(gain, 1)[0]
        out.append(i)
        if gain[i] > 0:
            basis.append(i)
    return out


def blockwise(L: Any, keep: int, per_step: int) -> list[int]:
    """`per_step` at a time, by the documented approximation."""
    out: list[int] = []
    while len(out) < keep:
        gain = [left(L[i, i]) if i not in out else -(10**6) for i in range(len(L))]
        step = best(gain, min(per_step, keep - len(out)))
        out += step
        explained = np.zeros_like(L)
        for i in step:
            explained += np.outer(L[i], L[i]) / max(sum(abs(L[i, j]) for j in step), 1 / 256)
        L = L - explained
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 4, 13, 20])
@pytest.mark.parametrize("relevance", ["clip", "llm"])
@pytest.mark.parametrize("per_step", [1, 3])
def test_against_the_definition(kind: str, keep: int, relevance: Any, per_step: int) -> None:
    given = guided(kind, DIM)
    tokens, index = run(CDPruner(keep=keep, relevance=relevance, per_step=per_step).fit(CLIP), given)
    for b in range(2):
        expected: list[int] = []
        for f in range(FRAMES):
            L = kernel(given, relevance, b, f)
            chosen = greedy(L, keep) if per_step == 1 else blockwise(L, keep, per_step)
            expected += [i + f * N for i in sorted(chosen)]
        assert index[b].tolist() == expected
        assert (tokens[b] == given["hidden"][b].reshape(-1, DIM)[expected]).all()


def test_of_two_equal_tokens_only_one_stays() -> None:
    given = guided("random", DIM)
    given["hidden"][:, :, 10:] = given["hidden"][:, :, :10]
    for row in run(CDPruner(keep=9).fit(LLM), given)[1]:
        assert len({i % 10 + i // N * 100 for i in row.tolist()}) == 2 * 9


def test_the_least_clip_like_and_the_most_text_like_come_first() -> None:
    given = guided("random", DIM)
    frame = np.array([[cosine(x, given["aligned_text"][0]) for x in f] for f in given["aligned"][0]])
    assert run(CDPruner(keep=1, relevance="clip").fit(CLIP), given)[1][0, 0] == frame[0].argmin()
    text = given["text"][0][given["text_mask"][0] > 0].mean(0)
    near = np.array([cosine(x, text) for x in given["hidden"][0, 0]])
    assert run(CDPruner(keep=1, relevance="llm").fit(CLIP), given)[1][0, 0] == near.argmax()


def test_padding_text_changes_nothing() -> None:
    given = guided("random", DIM)
    other = given | {"text": np.where(given["text_mask"][..., None] > 0, given["text"], 1e4).astype(np.float32)}
    method = CDPruner(keep=7).fit(LLM)
    assert (run(method, given)[1] == run(method, other)[1]).all()


def test_keeping_all_is_the_identity() -> None:
    given = guided("random", DIM)
    tokens, index = run(CDPruner(keep_ratio=1).fit(LLM), given)
    assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()


def test_auto_and_refusals() -> None:
    assert CDPruner(keep=3).fit(CLIP).relevance == "clip"
    assert CDPruner(keep=3).fit(LLM).relevance == "llm"
    assert CDPruner(keep=3).space == "llm"
    with pytest.raises(ReductionError, match="needs `aligned`, `aligned_text`"):
        CDPruner(keep=3, relevance="clip").fit(LLM)
    with pytest.raises(ReductionError, match=r"`per_step` .* at least 1; found 0"):
        CDPruner(keep=3, per_step=0).fit(LLM)
