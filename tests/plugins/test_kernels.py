"""The kernels, compiled for the CPU, against numpy: random shapes, ties, every order of threads."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.backends._contract import Array
from plugins._library import Library
from tests.plugins import host, oracle

ORDERS = (0, 1, 7)


@pytest.fixture(params=ORDERS, ids=lambda order: f"order{order}")
def ordered(request: pytest.FixtureRequest, library: Library) -> Library:
    library.order(request.param)
    return library


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
@pytest.mark.parametrize(
    ("tokens", "keep", "more", "width"), [(1, 1, 0, 3), (9, 4, 2, 8), (300, 299, 0, 5), (511, 20, 7, 4)]
)
def test_selects_as_rank_does(ordered: Library, tokens: int, keep: int, more: int, width: int, dtype: str) -> None:
    draw = np.random.default_rng(tokens)
    score = np.round(draw.normal(size=(2, tokens)) * 2).astype(np.float32)
    x = (draw.normal(size=(2, tokens + more, width)) * 1000).astype(dtype)
    attributes = dict(tokens=tokens, keep=keep, tensors=1)
    found = host.call(ordered, "token_select", [score, x], attributes)
    for ours, theirs in zip(found, oracle.token_select([score, x], attributes), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "scores",
    [
        np.zeros(40), np.where(np.arange(40) % 2, -0.0, 0.0), np.arange(40), -np.arange(40), np.full(40, -np.inf),
        np.r_[np.inf, np.full(38, -3e38), np.inf], np.float32(2) ** -np.arange(110, 150), np.r_[np.full(39, -1e9), -2e9],
    ],
    ids=["zeros", "both zeros", "rising", "falling", "minus infinity", "extremes", "subnormal", "never"],
)  # fmt: skip
def test_selects_among_odd_scores(library: Library, scores: Array) -> None:
    score = scores.astype(np.float32)[None]
    for keep in (1, 7, 39, 40):
        attributes = dict(tokens=40, keep=keep, tensors=0)
        (index,) = host.call(library, "token_select", [score], attributes)
        np.testing.assert_array_equal(index, oracle.token_select([score], attributes)[0])


def test_gathers_many_tensors_at_once(library: Library) -> None:
    draw = np.random.default_rng(3)
    attributes = dict(tokens=20, keep=6, tensors=8)
    tensors = [draw.normal(size=(2, 20 + i, *[3] * (i % 3))).astype(("float16", "float32")[i % 2]) for i in range(8)]
    inputs = [draw.normal(size=(2, 20)).astype(np.float32), *tensors]
    for ours, theirs in zip(
        host.call(library, "token_select", inputs, attributes), oracle.token_select(inputs, attributes), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("per_head", [False, True])
def test_compacts(ordered: Library, per_head: bool, dtype: str) -> None:
    draw = np.random.default_rng(5)
    attributes = dict(tokens=90, keep=31, tensors=3)
    index = host.ascending((2, 3, 31) if per_head else (2, 31), 90, draw)
    inputs = [index, *(draw.normal(size=(2, 3, 101, 12)).astype(dtype) for _ in range(3))]
    for ours, theirs in zip(
        host.call(ordered, "kv_compact", inputs, attributes), oracle.kv_compact(inputs, attributes), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_empty_places_of_a_head_are_token_0(library: Library) -> None:
    index = np.array([[[1, 4, -1], [0, 2, 3]]])
    inputs = [index, np.random.default_rng(1).normal(size=(1, 2, 7, 4)).astype(np.float32)]
    attributes = dict(tokens=5, keep=3, tensors=1)
    np.testing.assert_array_equal(
        *host.call(library, "kv_compact", inputs, attributes), *oracle.kv_compact(inputs, attributes)
    )


@pytest.mark.parametrize("keep", [0, 1, 200, 299, 300])
@pytest.mark.parametrize("width", [12, 7])
def test_compacts_in_place(ordered: Library, keep: int, width: int) -> None:
    """More than one chunk of a column, rows that chunks part, and indices that barely move."""
    draw = np.random.default_rng(keep)
    attributes = dict(tokens=300, keep=keep, tensors=2)
    index = host.ascending((2, keep), 300, draw)
    caches = [draw.normal(size=(2, 2, 340, width)).astype(np.float32) for _ in range(2)]
    wanted = oracle.kv_compact([index, *caches], attributes)
    left = 340 - 300 + keep
    outputs = [host.memory(x)._replace(shape=(2, 2, left, width)) for x in caches]
    ordered.run("kv_compact", [host.memory(x) for x in (index, *caches)], outputs, attributes)
    for cache, theirs in zip(caches, wanted, strict=True):
        np.testing.assert_array_equal(cache[:, :, :left], theirs)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("n", "depth", "dim", "r", "protected"),
    [(2, 3, 4, 1, 0), (33, 5, 130, 16, 1), (70, 40, 6, 35, 0), (131, 33, 9, 20, 2)],
)
def test_merges(ordered: Library, n: int, depth: int, dim: int, r: int, protected: int, dtype: str) -> None:
    draw = np.random.default_rng(n)
    metric = clear(n, depth, draw, dtype)
    inputs = [metric, draw.normal(size=(2, n, dim)).astype(dtype), draw.integers(1, 9, (2, n)).astype(np.float32)]
    attributes = dict(r=r, protected=protected)
    tokens, index, size = host.call(ordered, "token_merge", inputs, attributes)
    theirs = oracle.token_merge(inputs, attributes)
    np.testing.assert_array_equal(index, theirs[1])
    np.testing.assert_array_equal(size, theirs[2])
    np.testing.assert_allclose(tokens, theirs[0], rtol=2e-3 if dtype == "float16" else 2e-6, atol=1e-6)


def clear(n: int, depth: int, draw: np.random.Generator, dtype: str) -> Array:
    """[2, n, depth] without a cosine that rounds one way in float32 and the other in float64."""
    for _ in range(50):
        metric = draw.normal(size=(2, n, depth)).astype(dtype)
        if all(map(oracle.clear, metric)):
            return metric
    metric[:] = np.sign(metric)  # cosines are multiples of 1 / depth then
    return metric


def test_equal_tokens_merge_into_the_earliest(library: Library) -> None:
    """All cosines are 1: the first even tokens go, all to the first odd one. The zero vector is like nothing."""
    n = 12
    metric = np.ones((1, n, 4), np.float32)
    metric[0, 0] = 0
    hidden = np.arange(n, dtype=np.float32).reshape(1, n, 1)
    tokens, index, size = host.call(
        library, "token_merge", [metric, hidden, np.ones((1, n), np.float32)], dict(r=3, protected=0)
    )
    assert index[0].tolist() == [0, 8, 10, 1, 3, 5, 7, 9, 11]
    assert size[0].tolist() == [1, 1, 1, 4, 1, 1, 1, 1, 1]
    assert tokens[0, 3, 0] == (1 + 2 + 4 + 6) / 4


@pytest.mark.parametrize(
    ("name", "shapes", "attributes", "wrong"),
    [
        ("token_select", [(1, 5000)], dict(tokens=5000, keep=3, tensors=0), "more than 4096 scores"),
        ("token_select", [(1, 9)], dict(tokens=9, keep=10, tensors=0), "`keep` is not in 1..tokens"),
        ("token_select", [(1, 9), (1, 8, 2)], dict(tokens=9, keep=2, tensors=1), "tokens or more"),
        ("token_merge", [(1, 9, 4), (1, 9, 4), (1, 9)], dict(r=5, protected=1), "`r` is not in 1.."),
        ("token_merge", [(1, 9, 4), (1, 8, 4), (1, 9)], dict(r=2, protected=1), "differ in batch or tokens"),
    ],
)
def test_refuses(
    library: Library, name: str, shapes: list[tuple[int, ...]], attributes: dict[str, int], wrong: str
) -> None:
    with pytest.raises(ValueError, match=wrong):
        host.call(library, name, [np.zeros(s, np.float32) for s in shapes], attributes)


def test_refuses_types(library: Library) -> None:
    with pytest.raises(ValueError, match="a type that the plugin does not take"):
        host.call(library, "token_select", [np.zeros((1, 9), np.float16)], dict(tokens=9, keep=2, tensors=0))
