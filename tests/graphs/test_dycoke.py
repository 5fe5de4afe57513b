"""DyCoke's temporal stage against a loop written from the official behaviour."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.dycoke import DyCoke
from tests.graphs.oracle import KINDS, Array, cosine, features, grid

P, DIM = 10, 6


def site(frames: int, patches: int = P) -> Site:
    return Site(patches, frames, None, frozenset({"hidden"}))


def run(method: DyCoke, hidden: Array) -> tuple[Array, Array]:
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is None
    return out.tokens.numpy(), out.index.numpy()


def expected(hidden: Array, stay: int, last: str, order: str) -> list[int]:
    frames = len(hidden)
    kept: list[int] = []
    for f in range(frames):
        group, place = f - f % 4, f % 4
        whole_group_follows = group + 4 < frames
        reference = {0: None, 1: f - 1, 2: group, 3: f - 1}[place]
        if place == 2 and last == "paper" and not whole_group_follows:
            reference = None
        chosen = list(range(P))
        if reference is not None:
            near = [grid(cosine(hidden[f, p], hidden[reference, p])) for p in range(P)]
            chosen = sorted(range(P), key=lambda p: (near[p], p))[:stay]
            chosen = sorted(chosen) if order == "raster" else chosen
        kept += [f * P + p for p in chosen]
    return kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [2, 4, 5, 8, 11])
@pytest.mark.parametrize("last", ["paper", "repair"])
@pytest.mark.parametrize("order", ["paper", "raster"])
def test_against_the_official_behaviour(kind: str, frames: int, last: str, order: str) -> None:
    hidden = features(kind, (2, frames, P, DIM))
    thinned = {"paper": {2: 1, 4: 2, 5: 3, 8: 5, 11: 7}, "repair": {2: 1, 4: 3, 5: 3, 8: 6, 11: 8}}[last][frames]
    for stay in (0, 3, 7):
        keep = (frames - thinned) * P + thinned * stay
        method = DyCoke(keep=keep, last=last, order=order).fit(site(frames))  # type: ignore[arg-type]
        tokens, index = run(method, hidden)
        for b in range(2):
            assert index[b].tolist() == expected(hidden[b], stay, last, order)
            assert (tokens[b] == hidden[b].reshape(-1, DIM)[index[b]]).all()


def test_published_counts() -> None:
    assert DyCoke().fit(site(32, 196)).keep == 3098
    assert DyCoke(last="repair").fit(site(32, 196)).keep == 3098 - 138
    assert DyCoke().fit(site(32, 196)).position == "compact"
    fitted = DyCoke(keep_ratio=0.4).fit(site(32, 196))
    assert fitted.keep is not None
    assert abs(fitted.keep - 0.4 * 6272) <= 23 / 2
    assert fitted.fit(site(32, 196)) == fitted


def test_keeping_all_is_the_identity() -> None:
    hidden = features("random", (2, 8, P, DIM))
    tokens, index = run(DyCoke(keep_ratio=1.0).fit(site(8)), hidden)
    assert (tokens == hidden.reshape(2, -1, DIM)).all()
    assert (index == np.arange(8 * P)).all()


def test_the_fourth_frame_is_compared_with_the_whole_third() -> None:
    """Frame 3 equals frame 1 and is thinned; frame 4 differs from it in one place only, and that place stays."""
    hidden = features("random", (1, 8, P, DIM))
    hidden[:, 2] = hidden[:, 0]
    hidden[:, 3] = hidden[:, 2]
    hidden[:, 3, 9] = -hidden[:, 3, 9]
    _, index = run(DyCoke(keep=3 * P + 5).fit(site(8)), hidden)
    assert [i for i in index[0].tolist() if 3 * P <= i < 4 * P] == [3 * P + 9]


@pytest.mark.parametrize(
    ("method", "where", "message"),
    [
        (DyCoke(keep=42), site(8), "`keep` = 42 cannot be reached on this clip; the nearest would be 40 or 45"),
        (DyCoke(), site(1), "needs at least 2 frames; found 1"),
        (DyCoke(keep=40, keep_ratio=0.5), site(8), "exactly one of `keep`"),
        (DyCoke(), Site(P, 8), "needs `hidden`"),
    ],
)
def test_refusals(method: DyCoke, where: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(where)
