"""AdaTP against a loop over segments, places and frames, written from the account of the paper."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import Reduced, ReductionError, Site
from graphs.adatp import AdaTP
from tests.graphs.oracle import KINDS, Array, attention, best, cosine, features, grid

FRAMES, PATCHES, DIM, TEXT = 8, 6, 8, 5
N = FRAMES * PATCHES
SITE = Site(
    PATCHES, FRAMES, (2, 3), frozenset("hidden attention_row plain_row embeds text_embeds instruction_mask".split()), 32
)
MASK = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], np.float32)


def given(kind: str, row: str = "attention_row", seed: int = 0) -> dict[str, Array]:
    embeds = features(kind, (2, FRAMES, PATCHES, DIM), seed).reshape(2, N, DIM)
    score = attention(kind, (2, FRAMES, PATCHES), seed + 1).reshape(2, N) / np.float32(FRAMES)
    hidden = features("random", (2, N, DIM), seed + 2)
    text = features("random", (2, TEXT, DIM), seed + 3)
    return {"hidden": hidden, row: score, "embeds": embeds, "text_embeds": text, "instruction_mask": MASK}


def reduce(method: AdaTP, signals: dict[str, Array]) -> Reduced:
    return method.forward(method.layers[0], {k: torch.from_numpy(v) for k, v in signals.items()})


def expected(method: AdaTP, s: dict[str, Array]) -> list[int]:
    """The kept tokens of one sample."""
    assert method.segments is not None and method.keep is not None
    frame = [s["embeds"][f * PATCHES : (f + 1) * PATCHES].astype(np.float64).mean(0) for f in range(FRAMES)]
    alike = [grid(cosine(frame[f], frame[f - 1])) for f in range(1, FRAMES)]
    begins = [0, *(f + 1 for f in sorted(best([-a for a in alike], method.segments - 1)))]
    segments = [list(range(a, b)) for a, b in zip(begins, [*begins[1:], FRAMES], strict=True)]

    question = np.stack([t for t, m in zip(s["text_embeds"], s["instruction_mask"], strict=True) if m])
    near = [grid(cosine(f, question.astype(np.float64).mean(0))) for f in frame]
    span = max(near) - min(near)
    weight = [1 + method.strength * ((x - min(near)) / span if span else 0) for x in near]
    parts = [grid(sum(weight[f] for f in segment) / sum(weight)) for segment in segments]
    exact = [p * method.keep / sum(parts) for p in parts]
    quota = [math.floor(e) for e in exact]
    for g in best([grid(e - q) for e, q in zip(exact, quota, strict=True)], method.keep - sum(quota)):
        quota[g] += 1

    score = [grid(x, 1 / N) for x in s["attention_row" if method.rope else "plain_row"]]
    order = {}
    chosen, others = [], []
    for segment, count in zip(segments, quota, strict=True):
        for place in range(PATCHES):
            at = [f * PATCHES + place for f in segment]
            for turn, i in enumerate(sorted(at, key=lambda i: (-score[i], i))):
                order[i] = (turn, -score[i], i)
        tokens = sorted((f * PATCHES + p for f in segment for p in range(PATCHES)), key=lambda i: order[i])
        chosen += tokens[:count]
        others += tokens[count:]
    return sorted(chosen + sorted(others, key=lambda i: order[i])[: method.keep - len(chosen)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "knobs",
    [
        {"keep": 12},
        {"keep": 30, "segments": 3, "strength": 4.0},
        {"keep": 7, "segments": 8, "strength": 0.0, "rope": False},
        {"keep": 40, "segments": 1},
        {"keep": 45, "segments": 5, "strength": 9.0},
    ],
)
def test_against_the_account(kind: str, knobs: dict[str, Any]) -> None:
    method = AdaTP(**knobs).fit(SITE)
    signals = given(kind, method.needs[0])
    tokens, index, size = reduce(method, signals)
    assert size is None
    for b in range(2):
        assert index[b].tolist() == expected(method, {k: v[b] for k, v in signals.items()})
        assert np.array_equal(tokens[b].numpy(), signals["hidden"][b][index[b].numpy()])


def test_no_place_twice_in_a_segment_before_all_had_their_turn() -> None:
    signals = given("random")
    signals["attention_row"] = np.tile(np.arange(PATCHES, dtype=np.float32) / 100, (2, FRAMES))
    index = reduce(AdaTP(keep=PATCHES, segments=1).fit(SITE), signals).index
    assert index.tolist() == [list(range(PATCHES))] * 2, "the first frame, as all are equal"


def test_relevant_frames_get_more() -> None:
    signals = given("random")
    towards = np.repeat(np.array([0, 1], np.float32), N // 2)[:, None]
    signals["embeds"][:] = towards + np.eye(DIM, dtype=np.float32)[0]
    signals["text_embeds"][:] = 1
    halves = [
        int((reduce(AdaTP(keep=24, segments=2, strength=s).fit(SITE), signals).index[0] >= N // 2).sum())
        for s in (0.0, 1.0, 3.0)
    ]
    assert halves == [12, 16, 19]


def test_text_in_front_and_padding_have_no_say() -> None:
    signals = given("random")
    other = signals["text_embeds"].copy()
    other[:, 0] = other[0, 1] = 100
    method = AdaTP(keep=12, segments=4, strength=5.0).fit(SITE)
    a, b = (reduce(method, signals | {"text_embeds": t}).index for t in (signals["text_embeds"], other))
    assert torch.equal(a, b)


def test_one_image_is_fastv() -> None:
    signals = given("random")
    index = reduce(AdaTP(keep=9, frames=1).fit(SITE), signals).index
    for b in range(2):
        assert index[b].tolist() == sorted(best([grid(x, 1 / N) for x in signals["attention_row"][b]], 9))


def test_all_stay_as_they_are() -> None:
    signals = given("random")
    tokens, index, _ = reduce(AdaTP(keep=N).fit(SITE), signals)
    assert index.tolist() == [list(range(N))] * 2
    assert np.array_equal(tokens.numpy(), signals["hidden"])


def test_knobs() -> None:
    fitted = AdaTP().fit(SITE)
    assert (fitted.layer, fitted.keep, fitted.segments, fitted.frames, fitted.position) == (2, 12, 2, 8, "keep")
    assert fitted.fit(SITE) == fitted
    assert fitted.after(SITE) == Site(12, 1, None, SITE.signals, 32)
    lost = dataclasses.replace(SITE, grid=None)
    assert AdaTP(frames=4).fit(lost).segments == 1
    assert AdaTP().fit(dataclasses.replace(lost, frames=1)).frames == 1


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (AdaTP(layer=32), SITE, r"`layer` must be in 1..31"),
        (AdaTP(keep=49), SITE, r"`keep` must be in 1..48"),
        (AdaTP(segments=9), SITE, r"`segments` must be in 1..8, as there are 8 frames; found 9"),
        (AdaTP(strength=-1.0), SITE, r"`strength` is at least 0; found -1"),
        (AdaTP(frames=7), SITE, r"`frames` must divide the 48 tokens of the clip; found 7"),
        (AdaTP(), dataclasses.replace(SITE, grid=None), r"the raster of the tokens is lost here; give `frames`"),
    ],
)
def test_refusals(method: AdaTP, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
