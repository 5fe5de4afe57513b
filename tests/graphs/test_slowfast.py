"""SlowFast pooling against loops written from the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.slowfast import SlowFast
from tests.graphs.oracle import KINDS, Array, features

DIM = 3


def site(frames: int, height: int, width: int) -> Site:
    return Site(height * width, frames, (height, width), frozenset({"hidden"}))


def expected(
    clip: Array, slow: int, fast: int, height: int, width: int
) -> tuple[list[Array], list[int], list[list[int]]]:
    """Tokens, sizes, and the patches each token covers."""
    frames = len(clip)
    grid = clip.reshape(frames, height, width, DIM).astype(np.float64)
    tokens, sizes, covered = [], [], []
    for t in [int(x) for x in np.linspace(0, frames, slow + 1)[:-1] + 1e-9]:
        for r in range(height):
            for c in range(0, width, 2):
                columns = range(c, min(c + 2, width))
                tokens.append(np.max([grid[t, r, k] for k in columns], 0))
                covered.append([(t * height + r) * width + k for k in columns])
    for t in range(frames):
        for i in range(fast):
            for j in range(fast):
                cell = [
                    (r, c)
                    for r in range(int(np.floor(i * height / fast)), int(np.ceil((i + 1) * height / fast)))
                    for c in range(int(np.floor(j * width / fast)), int(np.ceil((j + 1) * width / fast)))
                ]
                tokens.append(np.mean([grid[t, r, c] for r, c in cell], 0))
                covered.append([(t * height + r) * width + c for r, c in cell])
    sizes = [len(c) for c in covered]
    return tokens, sizes, covered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("frames", "height", "width", "slow", "fast"),
    [(5, 4, 6, 2, 2), (3, 4, 4, 3, 1), (7, 5, 7, 3, 3), (4, 6, 8, 1, 4), (10, 3, 5, 4, 2)],
)
def test_against_the_paper(kind: str, frames: int, height: int, width: int, slow: int, fast: int) -> None:
    where = site(frames, height, width)
    method = SlowFast(slow_frames=slow, fast=fast).fit(where)
    hidden = features(kind, (2, frames, height * width, DIM))
    out = method.forward({"hidden": torch.from_numpy(hidden)})
    assert out.size is not None
    for b in range(2):
        tokens, sizes, covered = expected(hidden[b], slow, fast, height, width)
        np.testing.assert_allclose(out.tokens[b].numpy(), np.stack(tokens), atol=1e-6)
        assert out.size[b].tolist() == sizes
        index = out.index[b].tolist()
        assert len(set(index)) == len(index), "an anchor stands for one token only"
        assert all(i in patches for i, patches in zip(index, covered, strict=True)), (
            "an anchor lies in what it stands for"
        )
    assert method.keep == len(tokens)
    assert torch.nn.functional.adaptive_avg_pool2d(
        torch.from_numpy(hidden[0]).reshape(frames, height, width, DIM).permute(0, 3, 1, 2), fast
    ).permute(0, 2, 3, 1).reshape(-1, DIM).allclose(out.tokens[0, -frames * fast * fast :], atol=1e-5)  # fmt: skip


def test_published_counts() -> None:
    fitted = SlowFast().fit(site(50, 24, 24))
    assert (fitted.slow_frames, fitted.fast, fitted.keep, fitted.space) == (10, 4, 3680, "llm")
    assert fitted.fit(site(50, 24, 24)) == fitted
    assert SlowFast(keep=3680).fit(site(50, 24, 24)) == fitted
    assert SlowFast(keep_ratio=3680 / 28800).fit(site(50, 24, 24)) == fitted
    assert fitted.position == "compact"
    assert fitted.after(site(50, 24, 24)).tokens == 3680


def test_ratios_split_like_the_paper() -> None:
    for ratio in (0.05, 0.2, 0.4, 0.6):
        fitted = SlowFast(keep_ratio=ratio).fit(site(16, 24, 24))
        assert fitted.keep is not None
        assert fitted.slow_frames is not None
        assert abs(fitted.keep - ratio * 9216) < 0.1 * ratio * 9216
        assert 0.6 < fitted.slow_frames * 288 / fitted.keep < 0.95
    one = SlowFast(keep_ratio=0.3, slow_frames=2).fit(site(16, 24, 24))
    assert (one.slow_frames, one.fast) == (2, 12)


def test_equal_tokens_stay_themselves() -> None:
    hidden = features("equal", (1, 4, 16, DIM))
    out = SlowFast().fit(site(4, 4, 4)).forward({"hidden": torch.from_numpy(hidden)})
    np.testing.assert_allclose(out.tokens[0].numpy(), np.tile(hidden[0, 0, 0], (out.tokens.shape[1], 1)), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "where", "message"),
    [
        (SlowFast(slow_frames=9), site(8, 4, 4), "`slow_frames` must be in 1..8 on this clip; found 9"),
        (SlowFast(fast=3), site(8, 4, 4), "`fast` must be in 1..2 on this clip; found 3"),
        (SlowFast(keep=17), site(8, 4, 4), "`keep` = 17 cannot be reached on this clip; the nearest would be 16 or 24"),
        (SlowFast(), site(8, 4, 1), "a row needs at least 2; found 1"),
        (SlowFast(), Site(16, 8, None, frozenset({"hidden"})), "needs the raster of the tokens"),
        (SlowFast(rows=5), site(8, 4, 4), "`rows` must divide the 16 tokens"),
        (SlowFast(), site(1, 4, 4), "needs at least 2 frames; found 1"),
    ],
)
def test_refusals(method: SlowFast, where: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(where)
