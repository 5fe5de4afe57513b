"""LongVU against loops written from the paper, and PyTorch's own bilinear resize."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.longvu import LongVU
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

H, W, DIM, TEXT = 3, 4, 6, 5
P = H * W
LOW = (2, 3)
L = LOW[0] * LOW[1]


def site(frames: int) -> Site:
    return Site(P, frames, (H, W), frozenset({"hidden", "text", "text_mask"}))


def signals(kind: str, frames: int) -> dict[str, Array]:
    mask = np.ones((2, TEXT), np.float32)
    mask[0, 3:] = 0
    return {
        "hidden": features(kind, (2, frames, P, DIM)),
        "text": features("random", (2, TEXT, DIM), 3),
        "text_mask": mask,
    }


def pooled(frame: Array) -> Array:
    x = torch.from_numpy(frame.astype(np.float64)).T.reshape(1, DIM, H, W)
    out = torch.nn.functional.interpolate(x, LOW, mode="bilinear", align_corners=False)
    return np.asarray(out.reshape(DIM, L).T.numpy())


def cell(i: int) -> int:
    """The patch in the middle of a low-resolution cell."""
    row, column = divmod(i, LOW[1])
    return int((row + 0.5) * H / LOW[0]) * W + int((column + 0.5) * W / LOW[1])


def expected(given: dict[str, Array], b: int, keep: int, frames: int, highres: int) -> list[tuple[int, Array, float]]:
    clip = given["hidden"][b]
    redundancy = []
    for start in range(0, len(clip), 16):
        window = [x.reshape(-1) for x in clip[start : start + 16]]
        for i, x in enumerate(window):
            mean = np.mean([cosine(x, y) for y in window])
            redundancy.append(10**6 if i == len(window) // 2 else grid(-mean))
    stay = sorted(best(redundancy, frames))
    low = [pooled(clip[t]) for t in stay]
    text = given["text"][b][given["text_mask"][b] > 0].astype(np.float64)
    means = [x.mean(0) for x in low]
    unit = np.sqrt(np.mean([(m**2).sum() for m in means]) * (text.mean(0) ** 2).sum())
    full = best([grid((x @ text.T).mean(), unit) for x in low], highres)
    if keep < frames * L:
        change = {}
        for i, x in enumerate(low):
            first = low[i - i % 8]
            for p in range(L):
                change[i, p] = 10**6 if i % 8 == 0 else grid(-cosine(x[p], first[p]))
        places = list(change)
        chosen = [places[c] for c in sorted(best(list(change.values()), keep))]
        return [(stay[i] * P + cell(p), low[i][p], P / L) for i, p in chosen]
    out = []
    for i, t in enumerate(stay):
        if i in full:
            out += [(t * P + p, clip[t, p], 1.0) for p in range(P)]
        else:
            out += [(t * P + cell(p), low[i][p], P / L) for p in range(L)]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("total", "frames", "highres", "keep"),
    [
        (5, 5, 2, 42), (5, 3, 1, 24), (6, 6, 0, 36), (4, 4, 4, 48), (6, 4, 4, 48), (6, 6, 0, 20), (18, 18, 0, 50),
        (20, 10, 0, 33), (18, 12, 3, 90),
    ],
)  # fmt: skip
def test_against_the_paper(kind: str, total: int, frames: int, highres: int, keep: int) -> None:
    method = LongVU(keep=keep, keep_frames=frames, highres=highres, low_grid=LOW).fit(site(total))
    given = signals(kind, total)
    out = method.forward({k: torch.from_numpy(given[k]) for k in method.needs})
    assert out.size is not None
    assert ("text" in method.needs) == (0 < highres < frames)
    for b in range(2):
        items = expected(given, b, keep, frames, highres)
        assert out.index[b].tolist() == [i for i, _, _ in items]
        assert out.size[b].tolist() == [n for _, _, n in items]
        np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([x for _, x, _ in items]), atol=1e-5)


def test_the_budget_decides() -> None:
    where = Site(144, 16, (12, 12), site(1).signals)

    def plan(**knobs: float) -> tuple[int | None, ...]:
        m = LongVU(**knobs).fit(where)  # type: ignore[arg-type]
        assert m.low_grid == (8, 8)
        assert m.fit(where) == m
        return m.keep_frames, m.highres, m.keep

    assert plan(keep=16 * 64) == (16, 0, 1024)
    assert plan(keep=16 * 64 + 3 * 80) == (16, 3, 1264)
    assert plan(keep_ratio=0.6) == (16, 4, 1344)
    assert plan(keep_ratio=1.0) == (16, 16, 2304)
    assert plan(keep=1000) == (16, 0, 1000), "16 frames are needed to fill it"
    assert plan(keep=300) == (8, 0, 300), "half of the frames, and of those what changes"
    assert plan(keep_ratio=0.001) == (8, 0, 64)
    assert plan(keep_frames=4, highres=2) == (4, 2, 4 * 64 + 2 * 80)
    assert LongVU(keep=1024).fit(where).position == "compact"


def test_keeping_all_is_the_identity() -> None:
    given = signals("random", 4)
    method = LongVU(keep_ratio=1.0).fit(site(4))
    out = method.forward({"hidden": torch.from_numpy(given["hidden"])})
    assert (out.tokens.numpy() == given["hidden"].reshape(2, -1, DIM)).all()
    assert (out.index.numpy() == np.arange(4 * P)).all()


def test_the_frame_the_question_is_about_stays_in_full() -> None:
    given = signals("random", 5)
    given["hidden"][:, 3] += 3 * given["text"][:, None, :3].mean(2)
    method = LongVU(highres=1).fit(site(5))
    out = method.forward({k: torch.from_numpy(given[k]) for k in method.needs})
    assert all(set(range(3 * P, 4 * P)) <= set(row) for row in out.index.tolist())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LongVU(keep=40, low_grid=LOW), "`keep` = 40 cannot be reached on this clip; the nearest would be 36 or 42"),
        (LongVU(keep=3, low_grid=LOW), "`keep` = 3 cannot be reached on this clip; the nearest would be 6$"),
        (LongVU(low_grid=(4, 4), keep=9), r"`low_grid` takes rows\+columns up to 3\+4; found 4\+4"),
        (LongVU(keep_frames=6, keep=9), "`keep_frames` must be in 1..5; found 6"),
        (LongVU(keep_frames=2, highres=3), "`highres` must be in 0..2, as so many frames stay; found 3"),
        (LongVU(), "exactly one of `keep`"),
    ],
)
def test_refusals(method: LongVU, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site(5))


def test_what_the_site_must_offer() -> None:
    with pytest.raises(ReductionError, match="needs at least 2 frames; found 1"):
        LongVU(keep=6).fit(site(1))
    with pytest.raises(ReductionError, match="needs the raster of the tokens"):
        LongVU(keep=30).fit(Site(P, 5, None, site(1).signals))
    with pytest.raises(ReductionError, match="needs `text`, `text_mask`"):
        LongVU(highres=1).fit(Site(P, 5, (H, W), frozenset({"hidden"})))
