"""SparseVLM against loops written from the paper and the order of steps in the official code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.sparsevlm import SparseVlm, picks
from tests.graphs.oracle import KINDS, Array, attention, best, features, grid
from tests.graphs.test_chatunivi import clusters

N, TEXT, DIM, HEADS = 60, 6, 8, 4
ATTENTION = ("text_attention", "plain_text_attention", "head_attention", "plain_head_attention")
SIGNALS = frozenset({"all_embeds", "text_embeds", "instruction_mask", "rope_response", *ATTENTION})
SITE = Site(20, 3, (4, 5), SIGNALS, 8, heads=HEADS)


def signals(kind: str, n: int = N) -> dict[str, Array]:
    return {
        "hidden": features(kind, (2, n, DIM)),
        "size": np.random.default_rng(4).integers(1, 4, (2, n)).astype(np.float32),
        "all_embeds": features(kind, (2, n + 3, DIM), 1),
        "text_embeds": features(kind, (2, TEXT, DIM), 2),
        "text_attention": attention(kind, (2, TEXT, n), 3),
        "plain_text_attention": attention(kind, (2, TEXT, n), 5),
        "head_attention": attention(kind, (2, HEADS, TEXT, n), 6),
        "plain_head_attention": attention(kind, (2, HEADS, TEXT, n), 7),
        "rope_response": np.random.default_rng(8).integers(-1, 9, (2, TEXT, n)).astype(np.float32) / 8,
        "instruction_mask": np.array([[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]], np.float32),
    }


def run(method: SparseVlm, given: dict[str, Array], layer: int = 1) -> Reduced:
    return method.forward(layer, {k: torch.from_numpy(v) for k, v in given.items()})


def scores(method: SparseVlm, given: dict[str, Array], b: int) -> list[int]:
    asks = [t for t in range(TEXT) if given["instruction_mask"][b, t]]
    embeds, text = (given[k][b].astype(np.float64) for k in ("all_embeds", "text_embeds"))
    share = np.zeros(len(asks))
    for v in embeds:
        alike = np.exp([v @ text[t] for t in asks])
        share += alike / alike.sum() / len(embeds)
    raters = [t for t, s in zip(asks, share, strict=True) if grid(s * len(asks)) > grid(1)] or asks
    plain, n = "" if method.rope else "plain_", given["hidden"].shape[1]
    if method.version == 1:
        paid = given[f"{plain}text_attention"][b].astype(np.float64)
        return [grid(np.mean([paid[t, i] for t in raters]), 1 / n) for i in range(n)]
    assert method.heads is not None
    each = given[f"{plain}head_attention"][b].astype(np.float64)
    if method.rope:
        each = each / np.maximum(given["rope_response"][b], 0.05)
    sums = [grid(float(sum(each[h, t].sum() for t in raters))) for h in range(HEADS)]
    heads = best(sums, method.heads)
    return [grid(np.mean([each[h, t, i] for h in heads for t in raters]), 1 / n) for i in range(n)]


def expected(
    method: SparseVlm, given: dict[str, Array], b: int, kept: int, means: int
) -> list[tuple[int, Array, float]]:
    """(index, token, size) of `kept` tokens and of `means` clusters, ascending."""
    score, hidden, size = scores(method, given, b), given["hidden"][b].astype(np.float64), given["size"][b]
    index = best(score, kept)
    out = [(i, hidden[i], size[i]) for i in index]
    if means:
        dropped = [i for i in range(len(score)) if i not in index]
        again = sorted(dropped[p] for p in best([score[i] for i in dropped], int(0.3 * len(dropped)) + 1))
        centres, parts = clusters([hidden[i] for i in again], means, means, raster=True)
        for c, part in zip(centres, parts, strict=True):
            members = [again[i] for i in part]
            out.append((again[c], hidden[members].mean(0), size[members].sum()))
    return sorted(out, key=lambda item: item[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "knobs", "kept", "means"),
    [
        (60, {}, 28, 2), (200, {}, 9, 6), (60, {}, 3, 2), (60, {}, 1, 1), (60, {}, 1, 0), (60, {}, 60, 0),
        (60, {"rope": False}, 28, 2), (60, {"version": 2}, 30, 0), (60, {"version": 2, "heads": 1}, 9, 0),
        (60, {"version": 2, "heads": 3, "rope": False}, 9, 0),
    ],
)  # fmt: skip
def test_against_the_paper(kind: str, n: int, knobs: dict[str, Any], kept: int, means: int) -> None:
    given = signals(kind, n)
    method = SparseVlm(**knobs, keep_list=(kept + means, 1, 1)).fit(Site(n, 1, None, SIGNALS, 8, heads=HEADS))
    out = run(method, given)
    for b in range(2):
        items = expected(method, given, b, kept, means)
        assert out.index[b].tolist() == [i for i, _, _ in items]
        np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([x for _, x, _ in items]), atol=1e-5)
        if out.size is not None:
            assert out.size[b].tolist() == [s for _, _, s in items]
    assert (out.size is None) == (method.version == 2)


@pytest.mark.parametrize("nominal", [(300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17)])
def test_the_official_lists(nominal: tuple[int, ...]) -> None:
    """Every stage keeps the listed number and adds its clusters."""
    n, totals = 576, []
    for kept in nominal:
        again = int((n - kept) * 0.3) + 1
        total = kept + int(again / 10) + 1
        assert picks(n, total) == kept
        totals.append(total)
        n = total
    where = Site(576, 1, (24, 24), SIGNALS, 32)
    fitted = SparseVlm(keep=totals[-1]).fit(where)
    assert (fitted.layers, fitted.keep_list) == ((3, 7, 16), tuple(totals))
    assert fitted.fit(where) == fitted
    if nominal[0] == 300:
        assert SparseVlm().fit(where) == fitted


@pytest.mark.parametrize("counts", [(300, 200, 118), (238, 108, 60), (246, 54, 28), (66, 34, 20)])
def test_the_official_lists_of_version_2(counts: tuple[int, ...]) -> None:
    where = Site(576, 1, (24, 24), SIGNALS, 32, heads=32)
    fitted = SparseVlm(version=2, keep=counts[-1]).fit(where)
    assert (fitted.keep_list, fitted.heads) == (counts, 14)
    assert fitted.fit(where) == fitted


@pytest.mark.parametrize("n", [1, 2, 7, 60, 145])
def test_every_count_can_be_met(n: int) -> None:
    """As in the official code, unless that would keep nothing: then the fewest clusters."""
    for left in range(1, n):
        kept = picks(n, left)
        clustered = int((n - kept) * 0.3) + 1
        assert 1 <= kept <= left
        assert left - kept == clustered // 10 + 1 or (kept == 1 and left - kept <= clustered // 10)
    assert picks(n, n) == n


def test_keeping_all_is_the_identity() -> None:
    given = signals("random")
    fitted = SparseVlm(keep_ratio=1.0).fit(SITE)
    assert fitted.keep_list == (N, N, N)
    tokens, index, size = run(fitted, given)
    assert size is not None
    assert (tokens.numpy() == given["hidden"]).all()
    assert (index.numpy() == np.arange(N)).all()
    assert (size.numpy() == given["size"]).all()


def test_only_text_behind_the_image_counts() -> None:
    given, method = signals("random"), SparseVlm(keep=5).fit(SITE)
    true = run(method, given)
    real = given["instruction_mask"][..., None] > 0
    other = given | {k: np.where(real, given[k], 9.0).astype(np.float32) for k in ("text_embeds", "text_attention")}
    assert torch.equal(run(method, other).index, true.index)
    behind = ("text_embeds", "text_attention")
    longer = given | {k: np.concatenate([0 * given[k] + 3, given[k]], 1) for k in behind}
    longer["instruction_mask"] = np.pad(given["instruction_mask"], ((0, 0), (TEXT, 0)))
    assert torch.equal(run(method, longer).index, true.index)


def test_only_raters_count() -> None:
    """The visual tokens resemble one text token: what another looks at does not matter."""
    given = signals("random")
    given["text_embeds"] = np.random.default_rng(8).standard_normal((2, TEXT, DIM)).astype(np.float32)
    given["all_embeds"][:] = 5 * given["text_embeds"][:, 4:5]
    given["rope_response"][:] = 1
    given["head_attention"][:] = 0.001
    given["head_attention"][:, :, 4, 10:20] = 0.01
    given["head_attention"][:, :, 5, 30:40] = 0.05
    out = run(SparseVlm(version=2, keep_list=(10, 1, 1)).fit(SITE), given)
    assert out.index.tolist() == 2 * [list(range(10, 20))]


def test_version_2_undoes_what_distance_does() -> None:
    """Attention that is only RoPE's decay says nothing: the earlier of equal tokens stay. And quiet heads are not heard."""
    given = signals("equal")
    response = np.linspace(0.3, 1, N, dtype=np.float32)
    given["rope_response"][:] = response
    given["head_attention"][:] = 0.01 * response
    method = SparseVlm(version=2, heads=2, keep_list=(10, 1, 1)).fit(SITE)
    assert run(method, given).index.tolist() == 2 * [list(range(10))]
    given["head_attention"][:, :2] *= 0.5
    given["head_attention"][:, :2, :, 40] = 0.02 * response[40]  # loud there, quiet in sum
    assert run(method, given).index.tolist() == 2 * [list(range(10))]
    given["head_attention"][:, 3, :, 50] *= 2
    assert run(method, given).index.tolist() == 2 * [[*range(9), 50]]


def test_batches_do_not_mix() -> None:
    given, method = signals("random"), SparseVlm(keep=6).fit(SITE)
    both = run(method, given)
    for b in range(2):
        alone = run(method, {k: v[b : b + 1] for k, v in given.items()})
        assert torch.equal(alone.index[0], both.index[b])
        torch.testing.assert_close(alone.tokens[0], both.tokens[b])


def test_float16_accumulates_in_float32() -> None:
    given: dict[str, Any] = {k: v.astype(np.float16) if "mask" not in k else v for k, v in signals("random").items()}
    given |= {k: v.astype(np.float32) for k, v in given.items() if k == "size" or "attention" in k}
    method = SparseVlm(keep=6).fit(SITE)
    narrow, wide = run(method, given), run(method, {k: v.astype(np.float32) for k, v in given.items()})
    assert narrow.tokens.dtype == torch.float16
    assert torch.equal(narrow.index, wide.index)
    assert torch.equal(narrow.tokens, wide.tokens.half())


def test_positions() -> None:
    grids = Site(60, 1, None, SIGNALS, 8, grid_positions=True, heads=HEADS)
    assert [SparseVlm(version=v).fit(s).position for v in (1, 2) for s in (SITE, grids)] == [
        "compact",
        "keep",
        "keep",
        "keep",
    ]
    assert SparseVlm(version=2, position="compact").fit(SITE).position == "compact"
    assert SparseVlm().merges
    assert not SparseVlm(version=2).merges
    with pytest.raises(ReductionError, match="`position` must be keep"):
        SparseVlm(position="compact").fit(grids)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SparseVlm(layer_list=(1, 2)), r"`layer_list` needs three layers; found 1\+2"),
        (SparseVlm(version=3), "`version` takes 1 or 2; found 3"),  # type: ignore[arg-type]
        (SparseVlm(keep=61), "found 61"),
        (SparseVlm(heads=2), r"`heads` belongs to version 2, in 1..4; found 2"),
        (SparseVlm(version=2, heads=5), r"`heads` belongs to version 2, in 1..4; found 5"),
    ],
)
def test_refusals(method: SparseVlm, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
