"""ToMe against a loop written from the paper."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.tome import ToMe
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

SITE = Site(24, 2, (4, 6), frozenset({"hidden", "keys", "cls", "keys@1"}), depth=3)


def one_block(hidden: Array, keys: Array, size: Array, r: int, cls: int) -> tuple[list[int], list[Array], list[float]]:
    """One sample: bipartite soft matching with a loop over the merged tokens."""
    if r == 0:
        return list(range(len(hidden))), list(hidden), [float(s) for s in size]
    a, b = list(range(0, len(hidden), 2)), list(range(1, len(hidden), 2))
    partner, score = {}, []
    for i in a:
        similar = [grid(cosine(keys[i], keys[j])) for j in b]
        partner[i] = b[best(similar, 1)[0]]
        score.append(-(10**9) if cls and i == 0 else max(similar))
    goes = [a[i] for i in best(score, r)]
    members = {j: [j] + [i for i in goes if partner[i] == j] for j in b}
    index, tokens, sizes = [i for i in a if i not in goes], [], []
    tokens, sizes = [hidden[i] for i in index], [float(size[i]) for i in index]
    for j, group in members.items():
        total = sum(float(size[m]) for m in group)
        tokens.append(sum(hidden[m].astype(np.float64) * float(size[m]) for m in group) / total)
        index.append(j)
        sizes.append(total)
    return index, tokens, sizes


def reduce(method: ToMe, block: int, hidden: Any, keys: Any, size: Array, cls: int = 0) -> Reduced:
    signals = {"hidden": hidden, "keys": keys, "size": size}
    return method.reduce_frame(block, {k: torch.from_numpy(v) for k, v in signals.items()}, cls)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize("keep", [3, 11, 20, 24])
def test_against_the_paper_block_by_block(kind: str, cls: int, keep: int) -> None:
    method = ToMe(keep=keep).fit(SITE)
    assert isinstance(method.schedule, tuple)
    hidden = features(kind, (2, 1, 24 + cls, 8))[:, 0]
    size = np.ones((2, 24 + cls), np.float32)
    for block in range(3):
        keys = hidden[..., :5] if kind != "random" else features("random", (*hidden.shape[:2], 5), block)
        if block not in method.blocks:
            assert method.schedule[block] == 0
            continue
        out = reduce(method, block, hidden, keys, size, cls)
        assert out.size is not None
        for b in range(2):
            index, tokens, sizes = one_block(hidden[b], keys[b], size[b], method.schedule[block], cls)
            assert out.index[b].tolist() == index
            assert out.size[b].tolist() == sizes
            np.testing.assert_allclose(out.tokens[b].numpy(), np.stack(tokens), atol=1e-5)
        hidden, size = out.tokens.numpy(), out.size.numpy()
        assert not cls or (size[:, 0] == 1).all(), "CLS is never merged"
    assert hidden.shape == (2, keep + cls, 8)
    assert (size.sum(1) == 24 + cls).all()


def test_merging_equal_tokens_changes_nothing() -> None:
    hidden = features("equal", (1, 1, 24, 8))[:, 0]
    method = ToMe(keep=12).fit(dataclasses.replace(SITE, depth=1))
    out = reduce(method, 0, hidden, hidden, np.ones((1, 24), np.float32))
    np.testing.assert_allclose(out.tokens.numpy(), hidden[:, :12], rtol=1e-6)
    assert out.size is not None
    assert out.size[0].tolist() == [13] + [1] * 11, "all go to the first of equals"


def test_zero_keys_are_no_nan() -> None:
    method = ToMe(keep=12).fit(dataclasses.replace(SITE, depth=1))
    hidden, zero = features("random", (1, 24, 8)), np.zeros((1, 24, 5), np.float32)
    out = reduce(method, 0, hidden, zero, np.ones((1, 24), np.float32))
    assert torch.isfinite(out.tokens).all()


def test_float16_accumulates_in_float32() -> None:
    """A token that stands for 60000 others would overflow in half precision."""
    method = ToMe(keep=12).fit(dataclasses.replace(SITE, depth=1))
    hidden = features("random", (1, 24, 8)).astype(np.float16)
    size = np.full((1, 24), 60000.0, np.float32)
    out = reduce(method, 0, hidden, hidden, size)
    wide = reduce(method, 0, hidden.astype(np.float32), hidden.astype(np.float32), size)
    assert out.tokens.dtype == torch.float16
    torch.testing.assert_close(out.tokens.float(), wide.tokens, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "depth", "knobs", "schedule"),
    [
        (576, 23, {"keep": 277}, (13,) * 23),
        (24, 3, {"keep": 14}, (4, 3, 3)),
        (24, 3, {"keep": 3}, (12, 6, 3)),
        (64, 2, {"keep": 18}, (28, 18)),
        (100, 5, {"keep": 60, "schedule": "linear"}, (16, 12, 8, 4, 0)),
        (24, 3, {"keep": 24}, (0, 0, 0)),
        (24, 1, {"keep": 12, "schedule": "linear"}, (12,)),
        (24, 3, {"schedule": (2,)}, (2, 2, 2)),
        (24, 3, {"schedule": (12, 0, 6)}, (12, 0, 6)),
    ],
)
def test_schedules(tokens: int, depth: int, knobs: dict[str, object], schedule: tuple[int, ...]) -> None:
    site = dataclasses.replace(SITE, tokens=tokens, depth=depth)
    method = ToMe(**knobs).fit(site)  # type: ignore[arg-type]
    assert method.schedule == schedule
    assert method.keep == tokens - sum(schedule)
    assert method.fit(site) == method


@pytest.mark.parametrize("kind", ["constant", "linear"])
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("tokens", [5, 24, 37])
def test_every_reachable_keep_is_reached(kind: str, depth: int, tokens: int) -> None:
    site = dataclasses.replace(SITE, tokens=tokens, depth=depth)
    smallest = -(-tokens // 2**depth)
    for keep in range(smallest, tokens + 1):
        schedule = ToMe(keep=keep, schedule=kind).fit(site).schedule  # type: ignore[arg-type]
        left = tokens
        assert len(schedule) == depth
        for r in schedule:
            assert isinstance(r, int)
            assert 0 <= r <= left // 2
            left -= r
        assert left == keep
    if smallest > 1:
        with pytest.raises(ReductionError, match=rf"`keep` must be at least {smallest}: {depth} blocks"):
            ToMe(keep=smallest - 1, schedule=kind).fit(site)  # type: ignore[arg-type]


def test_what_is_left_behind_it() -> None:
    assert ToMe(keep=12).fit(SITE).after(SITE) == Site(12, 2, None, frozenset({"hidden", "cls"}), 3)
    linear = ToMe(keep=12, schedule="linear").fit(SITE)
    assert linear.after(SITE).signals == {"hidden", "cls", "keys"}, "the last block merges nothing: its keys fit"
    assert linear.position == "compact"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ToMe(), "exactly one of `keep`"),
        (ToMe(schedule=(2, 2)), "one for each of the tower's 3 blocks; found 2"),
        (ToMe(schedule=(13, 0, 0)), r"may merge 0..12 of the 24 tokens that reach block 0; found 13"),
        (ToMe(schedule=(-1,)), "found -1"),
        (ToMe(schedule=(2,), keep=3), "this `schedule` keeps 18 of 24 tokens; leave out `keep` = 3"),
        (ToMe(schedule=(2,), keep_ratio=0.5), "leave out `keep_ratio` = 0.5"),
        (ToMe(keep=12, schedule="square"), "`schedule` takes constant, linear or whole numbers joined by"),  # type: ignore[arg-type]
    ],
)
def test_refusals(method: ToMe, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)
