"""Restore against a loop written from the paper and its official code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import PerFrame, ReductionError, Site
from graphs.lftr import Lftr
from graphs.random import Random
from graphs.restore import Restore
from graphs.uniform import Uniform
from graphs.visionzip import VisionZip
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

N, FRAMES, DIM = 24, 2, 8
SITE = Site(N, FRAMES, (4, 6), frozenset({"hidden", "keys", "cls", "cls_attention", "column_attention"}))


def run(method: Restore, hidden: Array) -> tuple[Array, Array, Array]:
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is not None
    return out.tokens.numpy(), out.index.numpy(), out.size.numpy()


def anchors(x: Array, count: int) -> list[int]:
    """Distinctive anchors among the rows of x."""
    n = len(x)
    similar = [[grid(cosine(x[i], x[j])) for j in range(n)] for i in range(n)]
    density = [grid(sum(cosine(x[i], x[j]) for j in range(n)), n) for i in range(n)]
    score = []
    for i in range(n):
        denser = [similar[i][j] for j in range(n) if density[j] > density[i]]
        distinct = 4096 - max(denser) if denser else 4096
        score.append(round(density[i] * distinct / 4096))
    return sorted(best(score, count))


def groups(x: Array, chosen: list[int], extra: int) -> list[list[int]]:
    """What each output token is made of."""
    rest = [i for i in range(len(x)) if i not in chosen]
    if extra:
        targets = [rest[i] for i in anchors(x[rest], extra)]
        alone = [[i] for i in chosen]
    else:
        targets, alone = chosen, []
    found = {t: [t] for t in targets}
    for i in rest:
        if i not in targets:
            found[targets[best([grid(cosine(x[i], x[t])) for t in targets], 1)[0]]].append(i)
    return alone + [sorted(g) for g in found.values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keep", "share"), [(8, 0.5), (9, 0.5), (7, 1.0), (12, 0.25), (24, 0.5), (1, 0.5)])
@pytest.mark.parametrize("selector", [Uniform(), Random(seed=2)], ids=["uniform", "random"])
def test_against_the_paper(kind: str, keep: int, share: float, selector: PerFrame) -> None:
    method = Restore(keep=keep, share=share, selector=selector).fit(SITE)
    assert isinstance(method.selector, PerFrame)
    assert method.selector.keep is not None
    hidden = features(kind, (2, FRAMES, N, DIM))
    tokens, index, size = run(method, hidden)
    plain = method.selector.forward({"hidden": torch.from_numpy(hidden)}).index.numpy().reshape(2, FRAMES, -1)
    for b in range(2):
        expected = []
        for f in range(FRAMES):
            x, chosen = hidden[b, f], (plain[b, f] - f * N).tolist()
            made = groups(x, chosen, keep - method.selector.keep)
            made = sorted(made, key=lambda g: g[(len(g) - 1) // 2])
            expected += [(f * N + g[(len(g) - 1) // 2], x[g].mean(0), len(g)) for g in made]
        assert index[b].tolist() == [i for i, _, _ in expected]
        assert size[b].tolist() == [s for _, _, s in expected]
        np.testing.assert_allclose(tokens[b], np.stack([t for _, t, _ in expected]), atol=1e-5)
        assert size[b].sum() == FRAMES * N


def test_keeping_all_is_the_identity() -> None:
    hidden = features("random", (2, FRAMES, N, DIM))
    tokens, index, size = run(Restore(keep=N, share=1.0, selector=Uniform()).fit(SITE), hidden)
    assert (tokens == hidden.reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()
    assert (size == 1).all()


def test_merging_equal_tokens_changes_nothing() -> None:
    hidden = features("equal", (1, FRAMES, N, DIM))
    tokens, _, size = run(Restore(keep=6, selector=Uniform()).fit(SITE), hidden)
    np.testing.assert_allclose(tokens[0], np.tile(hidden[0, 0, 0], (FRAMES * 6, 1)), rtol=1e-6)
    assert sorted(size[0, :6].tolist()) == [1, 1, 1, 1, 1, 19]


def test_what_is_asked_of_the_language_model() -> None:
    method = Restore(keep=8, selector=Uniform()).fit(SITE)
    assert (method.sized, method.position, method.merges) == (True, "keep", True)
    assert not Restore(keep=8, attention=False, selector=Uniform()).fit(SITE).sized
    assert method.fit(SITE) == method
    assert method.selector == Uniform(keep=4).fit(SITE)
    pruning = VisionZip(contextual=0, cls="off")
    assert Restore(keep=8, selector=pruning).fit(SITE).needs == ("hidden", "cls_attention")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Restore(selector=Uniform()), "exactly one of `keep`"),
        (Restore(keep=8, share=0, selector=Uniform()), r"`share` is what the selector chooses, in \(0, 1\]; found 0"),
        (
            Restore(keep=8, selector=Uniform(keep=8)),
            r"give the count to restore, not to its selector: restore:keep=8\+",
        ),
        (Restore(keep=8, selector=Lftr(spatial="topic")), "treats every frame alone, such as"),
        (Restore(keep=8, selector=VisionZip()), "merges tokens or passes CLS on"),
        (Restore(keep=8, selector=VisionZip(contextual=0)), "merges tokens or passes CLS on"),
        (Restore(keep=8, selector=VisionZip(score="topic")), "its selector does not fit: `score` takes"),  # type: ignore[arg-type]
        (Restore(keep=8, selector="uniform"), "`selector` takes a reduction; found 'uniform'"),  # type: ignore[arg-type]
    ],
)
def test_refusals(method: Restore, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
