"""STORM's sampling: whole frames, evenly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.storm import Storm
from tests.graphs.oracle import features

T, P, DIM = 7, 6, 5
SITE = Site(P, T, (2, 3), frozenset({"hidden", "cls", "text"}))


@pytest.mark.parametrize("every", range(1, T + 1))
def test_every_nth_frame_stays(every: int) -> None:
    hidden = features("random", (2, T, P, DIM))
    method = Storm(every=every).fit(SITE)
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    frames = [f for f in range(T) if f % every == 0]
    assert (out.tokens.numpy() == np.concatenate([hidden[:, f] for f in frames], 1)).all()
    assert out.index.tolist() == 2 * [[f * P + p for f in frames for p in range(P)]]
    assert out.size is None
    after = method.after(SITE)
    assert (after.frames, after.tokens, after.grid, after.signals) == (
        len(frames), P, (2, 3), frozenset({"hidden", "text"})
    )  # fmt: skip
    assert method.keep == len(frames) * P
    assert method.fit(SITE) == method


def test_counts() -> None:
    assert Storm().fit(SITE).every == 2
    assert [Storm(keep_ratio=r).fit(SITE).every for r in (1.0, 0.9, 0.5, 0.3, 0.01)] == [1, 1, 3, 4, 7]
    assert Storm(keep=2 * P).fit(SITE).every == 4, "of 4, 5 and 6 the most even"
    assert Storm().fit(SITE).position == "keep"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Storm(every=8), "`every` must be in 1..7 on this clip; found 8"),
        (Storm(keep=20), "`keep` = 20 cannot be reached on this clip; the nearest would be 18 or 24"),
        (Storm(every=2, keep=18), "`every` = 2 keeps 24 of 42 tokens; leave out `keep` = 18"),
        (Storm(every=2, keep_ratio=0.5), "leave out `keep_ratio` = 0.5"),
    ],
)
def test_refusals(method: Storm, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)


def test_one_frame_is_refused() -> None:
    with pytest.raises(ReductionError, match="needs at least 2 frames; found 1"):
        Storm().fit(Site(P, 1, (2, 3), frozenset({"hidden"})))
