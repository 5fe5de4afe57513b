"""DTD against a loop written from the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.dtd import Dtd
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

T, P, DIM = 5, 12, 6
SITE = Site(P, T, (3, 4), frozenset({"hidden"}))


def run(method: Dtd, hidden: Array) -> tuple[Array, Array]:
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is None
    return out.tokens.numpy(), out.index.numpy()


def expected(hidden: Array, keep: int, budget: str) -> list[int]:
    """Kept places of one clip."""
    change = {(t, p): grid(-cosine(hidden[t, p], hidden[t - 1, p])) for t in range(1, T) for p in range(P)}
    kept = list(range(P))
    if budget == "clip":
        places = list(change)
        chosen = sorted(best(list(change.values()), keep - P))
        return kept + [places[i][0] * P + places[i][1] for i in chosen]
    dropped = P - (keep - P) // (T - 1)
    for t in range(1, T):
        most_similar = sorted(range(P), key=lambda p: (change[t, p], -p))[:dropped]
        kept += [t * P + p for p in range(P) if p not in most_similar]
    return kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("keep", "budget"),
    [(16, "frame"), (40, "frame"), (56, "frame"), (13, "clip"), (31, "clip"), (59, "clip"), (12, "clip")],
)
def test_against_the_paper(kind: str, keep: int, budget: str) -> None:
    hidden = features(kind, (2, T, P, DIM))
    tokens, index = run(Dtd(keep=keep, budget=budget).fit(SITE), hidden)  # type: ignore[arg-type]
    for b in range(2):
        assert index[b].tolist() == expected(hidden[b], keep, budget)
        assert (tokens[b] == hidden[b].reshape(-1, DIM)[index[b]]).all()


@pytest.mark.parametrize("budget", ["frame", "clip"])
def test_keeping_all_is_the_identity(budget: str) -> None:
    hidden = features("random", (2, T, P, DIM))
    tokens, index = run(Dtd(keep_ratio=1.0, budget=budget).fit(SITE), hidden)  # type: ignore[arg-type]
    assert (tokens == hidden.reshape(2, -1, DIM)).all()
    assert (index == np.arange(T * P)).all()


def test_compared_with_the_frame_before_not_the_last_kept() -> None:
    """A slow drift: every step is small, so all of it may go, although the last frame differs from the first."""
    hidden = np.ones((1, T, P, 2), np.float32)
    for t in range(T):
        hidden[0, t, :6] = [np.cos(t * 0.3), np.sin(t * 0.3)]  # drifts
    hidden[0, T - 1, 6:] = [1.0, -1.0]  # jumps
    _, index = run(Dtd(keep=P + 6, budget="clip").fit(SITE), hidden)
    assert index[0, P:].tolist() == list(range((T - 1) * P + 6, T * P))


def test_of_two_equal_frames_the_second_goes() -> None:
    hidden = features("random", (1, T, P, DIM))
    hidden[:, 3] = hidden[:, 2]
    _, index = run(Dtd(keep=4 * P, budget="clip").fit(SITE), hidden)
    assert (index == np.r_[0 : 3 * P, 4 * P : 5 * P]).all()


def test_counts_of_the_relative_mode() -> None:
    """P + (T - 1) · (P - ⌊τ·P⌋), the nearest to the ratio."""
    assert Dtd(keep_ratio=0.01).fit(SITE).keep == P
    assert Dtd(keep_ratio=0.5).fit(SITE).keep == 28  # from 30: 28 or 32, the lower of equally near ones
    assert Dtd(keep_ratio=0.5, budget="clip").fit(SITE).keep == 30
    fitted = Dtd(keep_ratio=0.5).fit(SITE)
    assert fitted.fit(SITE) == fitted
    assert fitted.position == "keep"
    after = fitted.after(SITE)
    assert (after.tokens, after.frames, after.grid) == (28, 1, None)


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (Dtd(keep=30), SITE, "`keep` = 30 cannot be reached on this clip; the nearest would be 28 or 32"),
        (Dtd(keep=11, budget="clip"), SITE, "`keep` = 11 cannot be reached .* would be 12$"),
        (Dtd(), SITE, "exactly one of `keep`"),
        (Dtd(keep=61), SITE, r"`keep` must be in 1..60, as there are 60 tokens in the clip; found 61"),
        (Dtd(keep=12), Site(P, 1, None, frozenset({"hidden"})), "needs at least 2 frames; found 1"),
        (Dtd(keep=12), Site(P, 2), "needs `hidden`"),
    ],
)
def test_refusals(method: Dtd, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
