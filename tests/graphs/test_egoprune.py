"""EgoPrune against loops written from its two formulas."""

from __future__ import annotations

import numpy as np
import pytest

from graphs._contract import ReductionError, Site
from graphs.egoprune import EgoPrune
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid, run

T, P, DIM, TEXT = 4, 10, 6, 5
SITE = Site(P, T, (2, 5), frozenset({"hidden", "warp", "text", "text_mask"}))


def signals(kind: str) -> dict[str, Array]:
    mask = np.ones((2, TEXT), np.float32)
    mask[0, 3:] = 0
    return {
        "hidden": features(kind, (2, T, P, DIM)),
        "warp": np.random.default_rng(4).integers(-1, P, (2, T, P)),
        "text": features("random", (2, TEXT, DIM), 3),
        "text_mask": mask,
    }


def expected(
    given: dict[str, Array], b: int, keep: int, static: int, balance: float, diversity: str, step: int
) -> list[int]:
    hidden, warp = given["hidden"][b], given["warp"][b]
    left = [(0, p) for p in range(P)]
    for t in range(1, T):
        novelty = []
        for p in range(P):
            w = warp[t, p]
            novelty.append(10**6 if w < 0 else grid(-cosine(hidden[t, p], hidden[t - 1, w])))
        left += [(t, p) for p in sorted(best(novelty, P - static))]
    text = given["text"][b][given["text_mask"][b] > 0].astype(np.float64).mean(0)
    chosen: list[int] = []
    while len(chosen) < keep:
        score = []
        for i, (t, p) in enumerate(left):
            others = [left[c] for c in chosen if diversity == "clip" or left[c][0] == t]
            penalty = max([cosine(hidden[t, p], hidden[u, q]) for u, q in others], default=0.0)
            value = grid(balance * cosine(hidden[t, p], text) - (1 - balance) * penalty)
            score.append(-(10**9) if i in chosen else value)
        chosen += best(score, min(step, keep - len(chosen)))
    return [left[i][0] * P + left[i][1] for i in sorted(chosen)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("keep", "static", "balance", "diversity", "step"),
    [
        (7, 4, 0.5, "frame", 1),
        (12, 6, 0.3, "clip", 1),
        (11, 3, 0.8, "frame", 3),
        (9, 10, 0.5, "clip", 2),
        (16, 0, 0.6, "frame", 5),
    ],
)
def test_against_the_formulas(kind: str, keep: int, static: int, balance: float, diversity: str, step: int) -> None:
    method = EgoPrune(keep=keep, static_ratio=static / P, balance=balance, diversity=diversity, per_step=step).fit(SITE)  # type: ignore[arg-type]
    given = signals(kind)
    tokens, index = run(method, given)
    for b in range(2):
        assert index[b].tolist() == expected(given, b, keep, static, balance, diversity, step)
        assert (tokens[b] == given["hidden"][b].reshape(-1, DIM)[index[b]]).all()


def test_a_shifted_frame_is_dropped_where_it_overlaps() -> None:
    """The camera pans: frame 1 shows frame 0 two places on. What came into sight stays, what was seen goes."""
    given = signals("random")
    given["hidden"][:, 1, :8] = given["hidden"][:, 0, 2:]
    given["warp"][:, 1] = [2, 3, 4, 5, 6, 7, 8, 9, -1, -1]
    where = Site(P, 2, (2, 5), SITE.signals)
    clip = {k: v[:, :2] if k in ("hidden", "warp") else v for k, v in given.items()}
    _, index = run(EgoPrune(keep=12, static_ratio=0.8).fit(where), clip)
    assert (index == np.r_[0:P, P + 8, P + 9]).all()


def test_keeping_all_is_the_identity() -> None:
    given = signals("random")
    tokens, index = run(EgoPrune(keep_ratio=1.0).fit(SITE), given)
    assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
    assert (index == np.arange(T * P)).all()


def test_padding_text_changes_nothing() -> None:
    given, method = signals("random"), EgoPrune(keep=9).fit(SITE)
    other = given | {"text": np.where(given["text_mask"][..., None] > 0, given["text"], 1e4).astype(np.float32)}
    assert (run(method, given)[1] == run(method, other)[1]).all()


def test_defaults() -> None:
    fitted = EgoPrune(keep_ratio=0.25).fit(SITE)
    assert (fitted.keep, fitted.per_step, fitted.position, fitted.space) == (10, 1, "keep", "llm")
    assert fitted.static_ratio == 0.5, "30 of 40 go, half of them as redundant: 5 of each later frame"
    assert fitted.fit(SITE) == fitted
    assert EgoPrune(keep=100).fit(Site(P * 10, T, None, SITE.signals)).per_step == 4
    for ratio in np.linspace(0.02, 1, 30):
        EgoPrune(keep_ratio=float(ratio)).fit(SITE)


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (
            EgoPrune(keep=26, static_ratio=0.5),
            SITE,
            "`static_ratio` = 0.5 leaves 25 of 40 tokens, fewer than `keep` = 26",
        ),
        (EgoPrune(keep=9, balance=1.5), SITE, r"`balance` must be in 0..1; found 1.5"),
        (EgoPrune(keep=9, static_ratio=-0.5), SITE, r"`static_ratio` must be in 0..1; found -0.5"),
        (EgoPrune(keep=9, per_step=10), SITE, r"`per_step` must be in 1..9; found 10"),
        (EgoPrune(), SITE, "exactly one of `keep`"),
        (EgoPrune(keep=9), Site(P, T, None, frozenset({"hidden", "text", "text_mask"})), "needs `warp`"),
        (EgoPrune(keep=9), Site(P, 1, None, SITE.signals), "needs at least 2 frames; found 1"),
    ],
)
def test_refusals(method: EgoPrune, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
