"""LongVLM against a loop written from the paper and ToMe's rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.longvlm import LongVLM
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

T, P, DIM = 6, 9, 8
BLOCKS = frozenset(f"cls@{b}" for b in range(7))
SITE = Site(P, T, (3, 3), frozenset({"hidden", "cls"}) | BLOCKS, depth=6)
NO_CLS = Site(P, T, (3, 3), frozenset({"hidden"}), depth=6)


def signals(kind: str) -> dict[str, Array]:
    given = {"hidden": features(kind, (2, T, P, DIM))}
    return given | {f"cls@{b}": features("random", (2, T, DIM), 10 + b) for b in range(7)}


def merged(tokens: Array, keep: int, head_dim: int) -> list[tuple[int, Array, float]]:
    """(anchor, token, size) of one segment, in the order of the rounds."""
    items = [(i, x.astype(np.float64), 1.0) for i, x in enumerate(tokens)]
    while len(items) > keep:
        even, odd = items[::2], items[1::2]
        r = min(len(odd), len(items) - keep)

        def metric(x: Array) -> Array:
            return x.reshape(-1, head_dim).mean(0) if len(x) % head_dim == 0 else x

        near = [[grid(cosine(metric(a), metric(b))) for _, b, _ in odd] for _, a, _ in even]
        goes = best([max(row) for row in near], r)
        groups = [[item] for item in odd]
        for i in sorted(goes):
            groups[best(near[i], 1)[0]].append(even[i])
        items = [even[i] for i in range(len(even)) if i not in goes]
        for group in groups:
            size = sum(n for _, _, n in group)
            items.append((group[0][0], sum(x * n for _, x, n in group) / size, size))
    return items


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("cut", "each", "globals_", "head_dim", "order"),
    [
        (2, 5, 3, 64, "paper"),
        (3, 18, 0, 64, "paper"),
        (1, 7, 2, 4, "raster"),
        (2, 20, 5, 4, "paper"),
        (2, 13, 1, 4, "raster"),
    ],
)
def test_against_the_paper(kind: str, cut: int, each: int, globals_: int, head_dim: int, order: str) -> None:
    keep = cut * each + globals_
    method = LongVLM(keep=keep, segments=cut, global_tokens=globals_, head_dim=head_dim, order=order).fit(SITE)  # type: ignore[arg-type]
    given = signals(kind)
    out = method.forward({k: torch.from_numpy(given[k]) for k in method.needs})
    assert out.size is not None
    for b in range(2):
        expected = [(-1, given[f"cls@{k}"][b].mean(0), T) for k in range(7 - globals_, 7)]
        for s, segment in enumerate(given["hidden"][b].reshape(cut, -1, DIM)):
            part = merged(segment, each, head_dim)
            part = sorted(part, key=lambda item: item[0]) if order == "raster" else part
            expected += [(i + s * T * P // cut, x, n) for i, x, n in part]
        assert out.index[b].tolist() == [i for i, _, _ in expected]
        assert out.size[b].tolist() == [n for _, _, n in expected]
        np.testing.assert_allclose(out.tokens[b].numpy(), np.stack([x for _, x, _ in expected]), atol=1e-5)
    assert (out.size[:, globals_:].sum(1) == T * P).all()


def test_published_rounds_and_counts() -> None:
    where = Site(256, 100, (16, 16), frozenset({"hidden"}) | {f"cls@{b}" for b in range(24)}, depth=23)
    fitted = LongVLM().fit(where)
    assert (fitted.segments, fitted.keep, fitted.global_tokens) == (10, 305, 5)
    assert fitted.global_blocks == (19, 20, 21, 22, 23)
    assert fitted.fit(where) == fitted
    assert fitted.needs == ("hidden", "cls@19", "cls@20", "cls@21", "cls@22", "cls@23")
    assert (fitted.after(where).tokens, fitted.position) == (305, "compact")
    n, rounds = 2560, []
    while n > 30:
        rounds.append(min(n // 2, n - 30))
        n -= rounds[-1]
    assert rounds == [1280, 640, 320, 160, 80, 40, 10]


def test_without_cls_there_are_no_global_tokens() -> None:
    fitted = LongVLM(keep_ratio=0.5).fit(NO_CLS)
    assert (fitted.segments, fitted.global_tokens, fitted.global_blocks, fitted.keep) == (1, 0, None, 27)
    assert LongVLM().fit(NO_CLS).keep == 30
    assert LongVLM(keep_ratio=0.001).fit(SITE).keep == 6


def test_keeping_all_is_the_identity() -> None:
    hidden = features("random", (2, T, P, DIM))
    out = LongVLM(keep_ratio=1.0).fit(NO_CLS).forward({"hidden": torch.from_numpy(hidden)})
    assert (out.tokens.numpy() == hidden.reshape(2, -1, DIM)).all()
    assert (out.index.numpy() == np.arange(T * P)).all()


def test_halving_an_even_number_leaves_no_empty_tensor() -> None:
    """Where all even places go, nothing is gathered: TensorRT should see no tensor of size 0."""
    from exporter.stages._trace import trace

    method = LongVLM(keep=14, segments=1).fit(Site(14, 2, None, frozenset({"hidden"})))

    class Once(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> list[torch.Tensor]:
            return [x for x in method.forward({"hidden": hidden}) if x is not None]

    model = trace(Once(), {"hidden": torch.zeros(3, 2, 14, DIM)}, {"hidden": {0: "batch"}})
    shapes = [v.shape for node in model.graph for v in node.outputs if v.shape is not None]
    assert shapes
    assert not [s for s in shapes if 0 in list(s)]


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (LongVLM(segments=4), SITE, r"`segments` must divide the 6 frames \(one of 1, 2, 3, 6\); found 4"),
        (LongVLM(global_tokens=8), SITE, "`global_tokens` = 8 needs the class token .* offers 7"),
        (
            LongVLM(keep=21, segments=3),
            SITE,
            "`keep` = 21 cannot be reached on this clip; the nearest would be 20 or 23",
        ),
        (LongVLM(keep=7, segments=2, global_tokens=0), SITE, "the nearest would be 6 or 8"),
        (LongVLM(head_dim=0), SITE, "`head_dim` must be at least 1; found 0"),
        (LongVLM(), Site(P, 1, (3, 3), frozenset({"hidden"})), "needs at least 2 frames; found 1"),
    ],
)
def test_refusals(method: LongVLM, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
