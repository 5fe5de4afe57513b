"""PAR against loops over clusters, density peaks included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphs._contract import ReductionError, Site
from graphs.par import Par
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid, run

N, FRAMES, DIM, TEXT = 20, 2, 6, 5
SITE = Site(N, FRAMES, (4, 5), frozenset({"hidden", "text", "text_mask"}))


def signals(kind: str) -> dict[str, Array]:
    mask = np.ones((2, TEXT), np.float32)
    mask[0, 3:] = 0
    return {
        "hidden": features(kind, (2, FRAMES, N, DIM)),
        "text": features("random", (2, TEXT, DIM), 3),
        "text_mask": mask,
    }


def clusters(x: Any, count: int, neighbours: int) -> list[list[int]]:
    """Members of every cluster, clusters in the order of their centres."""
    x = x.astype(np.float64)
    raw = ((x[:, None] - x[None]) ** 2).mean(-1)
    step = max(raw.max(), 1e-6 * (x**2).mean(-1).max()) / 4096
    d = np.round(raw / step)
    density = [grid(np.exp(-np.sort(row)[:neighbours].mean() * step)) for row in d]
    peak = []
    for i in range(N):
        denser = [d[i, j] for j in range(N) if (-density[j], j) < (-density[i], i)]
        delta = np.sqrt((min(denser) if denser else d.max()) * step)
        peak.append(density[i] * round(delta * 4096 / np.sqrt(max(d.max() * step, 1e-12))))
    centres = sorted(best(peak, count))
    out: list[list[int]] = [[] for _ in centres]
    for i in range(N):
        if i in centres:
            out[centres.index(i)].append(i)
        else:
            far = [round(d[i, c] / max(d.max(), 1) * 4096) for c in centres]
            out[far.index(min(far))].append(i)
    return out


def one_frame(hidden: Any, text: Any, method: Par) -> list[int]:
    assert method.clusters is not None
    assert method.keep is not None
    groups = clusters(hidden, method.clusters, method.neighbours)
    asked = best([grid(cosine(hidden[g].mean(0), text)) for g in groups], len(groups))
    queues = [[groups[c][j] for j in best([grid(cosine(hidden[i], text)) for i in groups[c]], N)] for c in asked]
    kept: list[int] = []
    while len(kept) < method.keep:
        for queue in queues:
            kept += queue[: method.per_cluster]
            del queue[: method.per_cluster]
    return sorted(kept[: method.keep])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 7, 12, 19])
@pytest.mark.parametrize(("count", "per_cluster", "neighbours"), [(None, 4, 5), (5, 2, 3), (1, 4, 5), (4, 100, 30)])
def test_against_the_definition(kind: str, keep: int, count: int | None, per_cluster: int, neighbours: int) -> None:
    method = Par(keep=keep, clusters=count, per_cluster=per_cluster, neighbours=neighbours).fit(SITE)
    given = signals(kind)
    tokens, index = run(method, given)
    for b in range(2):
        text = given["text"][b][given["text_mask"][b] > 0].mean(0)
        expected = [i + f * N for f in range(FRAMES) for i in one_frame(given["hidden"][b, f], text, method)]
        assert index[b].tolist() == expected
        assert (tokens[b] == given["hidden"][b].reshape(-1, DIM)[expected]).all()


def test_one_cluster_is_a_ranking_by_the_text() -> None:
    given = signals("random")
    index = run(Par(keep=6, clusters=1).fit(SITE), given)[1]
    text = given["text"][1].mean(0)
    scores = [grid(cosine(x, text)) for x in given["hidden"][1, 0]]
    assert index[1, :6].tolist() == sorted(best(scores, 6))


def test_padding_text_changes_nothing() -> None:
    given = signals("random")
    other = given | {"text": np.where(given["text_mask"][..., None] > 0, given["text"], 1e4).astype(np.float32)}
    method = Par(keep=7).fit(SITE)
    assert (run(method, given)[1] == run(method, other)[1]).all()


def test_keeping_all_is_the_identity() -> None:
    given = signals("random")
    tokens, index = run(Par(keep_ratio=1).fit(SITE), given)
    assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Par(keep=4, clusters=21), r"`clusters` must be in 1\.\.20, .* found 21"),
        (Par(keep=4, per_cluster=0), "`per_cluster` must be at least 1; found 0"),
        (Par(keep=4, neighbours=0), "`neighbours` must be at least 1; found 0"),
    ],
)
def test_refusals(method: Par, message: str) -> None:
    assert Par(keep=4).fit(SITE).clusters == 2
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
