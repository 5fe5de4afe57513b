"""MustDrop's stages in the language model against a loop written from the paper, ranks in place of thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.mustdrop_l import MustDropL
from tests.graphs.oracle import attention, best, grid

TEXT, FRAMES, TOKENS = 7, 2, 12
ALL = FRAMES * TOKENS
INSIDE = frozenset({"text_attention", "instruction_mask", "places"})
TOWER = frozenset({"cls_attention@3", "cls_attention@5"})
SITE = Site(TOKENS, FRAMES, (3, 4), INSIDE | TOWER, depth=8)
MASKS = np.array([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]], np.float32)
KINDS = ("random", "ties", "equal")


def official(rows: Any, mask: Any, held: list[bool], individual: float, ratio: float) -> list[int]:
    """What stays by thresholds. rows: [text, tokens]."""
    paid = rows[mask > 0].astype(np.float64)
    total, most = paid.sum(0), paid.max(0)
    dropped = (total < total.sum() * ratio * individual) & (most < individual) & ~np.array(held)
    return np.flatnonzero(~dropped).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.0, 1.1, 5.0])
@pytest.mark.parametrize("key_ratio", [0.0, 0.2, 0.5])
def test_against_the_paper(kind: str, ratio: float, key_ratio: float) -> None:
    counts = (20, 20, 13, 12)
    method = MustDropL(layer_list=(1, 2, 5, 7), keep_list=counts, ratio=ratio, key_ratio=key_ratio).fit(SITE)
    salient = attention(kind, (3, FRAMES, TOKENS), 9)
    each = {0.0: 0, 0.2: 3, 0.5: 6}[key_ratio]
    present = [list(range(ALL)) for _ in range(3)]
    hidden = torch.arange(float(ALL))[None, :, None].expand(3, -1, 2)
    keys = [
        {f * TOKENS + i for f in range(FRAMES) for i in best([grid(a, 1 / TOKENS) for a in salient[b, f]], each)}
        for b in range(3)
    ]
    for layer, left in zip(method.layers, counts, strict=True):
        n = hidden.shape[1]
        rows = 0.6 * attention(kind, (3, TEXT, n), layer)  # the rest of the attention goes to the text
        signals = {"text_attention": rows, "instruction_mask": MASKS, "cls_attention@5": salient, "places": present}
        named = {name: torch.from_numpy(np.asarray(signals[name])) for name in method.needs}
        out = method.forward(layer, named | {"hidden": hidden})
        for b in range(3):
            paid = rows[b, MASKS[b] > 0].astype(np.float64)
            units = [max(paid[:, v].sum() / paid.sum(), ratio * paid[:, v].max()) for v in range(n)]
            score = [(present[b][v] in keys[b], grid(units[v], 1 / n)) for v in range(n)]
            places = sorted(sorted(range(n), key=lambda v: (-score[v][0], -score[v][1], v))[:left])
            assert out.index[b].tolist() == places
            present[b] = [present[b][p] for p in places]
            assert out.tokens[b, :, 0].tolist() == present[b]
            assert keys[b] <= {*present[b]}
        assert out.size is None
        hidden = out.tokens


@pytest.mark.parametrize("ratio", [1.0, 1.2, 5.0])
def test_what_the_papers_thresholds_drop(ratio: float) -> None:
    """Given as many as thresholds in this ratio would leave, these stay."""
    sharp, salient = attention("random", (1, TEXT, ALL)) ** 4, attention("random", (1, FRAMES, TOKENS), 1)
    rows = 0.6 * sharp / sharp.sum(-1, keepdims=True)
    signals = {"text_attention": rows, "instruction_mask": MASKS[:1], "cls_attention@5": salient}
    signals |= {"places": np.arange(ALL)[None], "hidden": np.zeros((1, ALL, 2), np.float32)}
    held = [bool(salient[0, i // TOKENS, i % TOKENS] >= np.sort(salient[0, i // TOKENS])[-2]) for i in range(ALL)]
    assert sum(held) == 2 * FRAMES
    counts = []
    for individual in (0.02, 0.06, 0.12):
        stays = official(rows[0], MASKS[0], held, individual, ratio)
        counts.append(len(stays))
        method = MustDropL(layer_list=(2,), keep=len(stays), ratio=ratio, key_ratio=0.15).fit(SITE)
        found = method.forward(2, {name: torch.from_numpy(value) for name, value in signals.items()})
        assert found.index.tolist() == [stays]
    assert ALL > counts[0] > counts[1] > counts[2] >= 2 * FRAMES


def test_text_before_the_image_has_no_say() -> None:
    rows = torch.zeros(1, 2, ALL)
    rows[0, 0, 3], rows[0, 1, 9] = 0.9, 0.1
    signals = {"text_attention": rows, "instruction_mask": torch.tensor([[0.0, 1.0]]), "hidden": torch.zeros(1, ALL, 2)}
    method = MustDropL(layer_list=(2,), keep=1, key_ratio=0.0).fit(SITE)
    assert method.forward(2, signals).index.tolist() == [[9]]


def test_the_papers_places_and_counts() -> None:
    site = Site(576, grid=(24, 24), signals=INSIDE | {f"cls_attention@{b}" for b in range(24)}, depth=32)
    method = MustDropL().fit(site)
    assert (method.layers, method.since, method.everywhere) == ((3, 7, 11, 15), 2, True)
    assert method.needs == ("text_attention", "instruction_mask", "places", "cls_attention@23")
    assert method.fit(site) == method

    def mean(entering: int, counts: tuple[int, ...]) -> float:
        """What a layer hands on, over 32 layers: the first two all, then what is left behind layers 2, 6, 10 and 14."""
        return (2 * entering + 4 * sum(counts[:3]) + 18 * counts[3]) / 32

    assert method.keep_list == (359, 231, 156, 111)
    assert round(mean(576, method.keep_list)) == 192
    fewer = MustDropL(keep=60).fit(site)
    assert fewer.keep_list == (256, 130, 80, 60)
    assert mean(576, fewer.keep_list) == 128
    least = MustDropL(keep_list=(54, 36, 36, 36)).fit(Site(448, signals=site.signals, depth=32))
    assert mean(448, least.keep_list or ()) == 64
    assert mean(576, (47, 47, 47, 47)) > 64, "why the first stage has to act, too"
    assert MustDropL(keep=47).fit(site).keep_list == (47, 47, 47, 47)
    assert MustDropL(keep=576).fit(site).keep_list == (576, 576, 576, 576)
    assert MustDropL(keep=36, key_ratio=0.0).fit(site).keep_list == (288, 144, 72, 36)


@pytest.mark.parametrize(("depth", "layers"), [(2, (1,)), (4, (1, 2, 3)), (5, (1, 2, 3, 4)), (28, (3, 6, 10, 13))])
def test_other_depths(depth: int, layers: tuple[int, ...]) -> None:
    method = MustDropL().fit(Site(TOKENS, signals=INSIDE | TOWER, depth=depth))
    assert method.layers == layers
    assert len(method.keep_list or ()) == len(layers)


@pytest.mark.parametrize(
    ("knobs", "signals", "message"),
    [
        ({"ratio": -1.0}, TOWER, "`ratio` is at least 0; found -1"),
        ({"key_ratio": 1.5}, TOWER, r"`key_ratio` is a share of a frame's tokens, in 0\.\.1; found 1.5"),
        (
            {"keep": 1},
            TOWER,
            r"the 2 key tokens always stay, so `keep` must be in 2\.\.24; found 1. Keep more, or make",
        ),
        ({"keep_list": (9, 9, 9, 1)}, TOWER, "the 2 key tokens always stay"),
        ({"block": 4}, TOWER, "it needs `cls_attention@4`"),
        ({}, frozenset(), "a tower with CLS, whose tokens enter .* `key_ratio=0` does without key tokens"),
    ],
)
def test_refusals(knobs: dict[str, Any], signals: frozenset[str], message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        MustDropL(**knobs).fit(Site(TOKENS, FRAMES, (3, 4), INSIDE | signals, depth=8))
