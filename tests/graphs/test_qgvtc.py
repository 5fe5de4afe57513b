"""QG-VTC against a loop over tokens, with and without a trained layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.qgvtc import QgVtc, counts
from tests.graphs.oracle import KINDS, Array, best, cosine, features, grid

N, FRAMES, DIM, LLM_DIM, TEXT = 20, 2, 6, 9, 5
SITE = Site(N, FRAMES, (4, 5), frozenset({"hidden", "text", "text_mask"}), dim=DIM, llm_dim=LLM_DIM)


def signals(kind: str, method: QgVtc) -> dict[str, Array]:
    mask = np.ones((2, TEXT), np.float32)
    mask[0, 3:] = 0
    width = LLM_DIM if method.weights else DIM
    given = {
        "hidden": features(kind, (2, FRAMES, N, DIM)),
        "text": features("random", (2, TEXT, width), 3),
        "text_mask": mask,
    }
    for seed, (name, shape) in enumerate(method.trained(SITE).items()):
        given[name] = features("random", shape, 10 + seed)
    return given


def run(method: QgVtc, given: dict[str, Array]) -> tuple[Array, Array, Array]:
    out = method.forward({k: torch.from_numpy(v) for k, v in given.items()})
    assert out.size is not None
    return out.tokens.numpy(), out.index.numpy(), out.size.numpy()


def question(given: dict[str, Array], b: int) -> Any:
    text = given["text"][b][given["text_mask"][b] > 0].mean(0).astype(np.float64)
    if "question_in" in given:
        inner = np.maximum(0, text @ given["question_in"] + given["question_in_bias"])
        text = inner @ given["question_out"] + given["question_out_bias"]
    return text


def one_frame(hidden: Any, text: Any, goals: list[int]) -> list[Any]:
    """(index, token, size)"""
    parts = [(i, x.astype(np.float64), 1.0) for i, x in enumerate(hidden)]
    for goal in goals:
        kept = sorted(best([grid(cosine(x, text)) for _, x, _ in parts], goal))
        total = {k: parts[k][2] * parts[k][1] for k in kept}
        size = {k: parts[k][2] for k in kept}
        for j, (_, x, s) in enumerate(parts):
            if j in kept:
                continue
            attention = np.array([np.exp(DIM**0.5 * cosine(x, parts[k][1])) for k in kept])
            for k, a in zip(kept, attention / attention.sum(), strict=True):
                total[k] = total[k] + a * s * x
                size[k] += a * s
        parts = [(parts[k][0], total[k] / size[k], size[k]) for k in kept]
    return parts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, "layer.safetensors"])
@pytest.mark.parametrize(("keep", "stages"), [(5, 3), (1, 2), (19, 3), (8, 1)])
def test_against_the_definition(kind: str, weights: str | None, keep: int, stages: int) -> None:
    method = QgVtc(keep=keep, stages=stages, weights=weights).fit(SITE)
    given = signals(kind, method)
    tokens, index, size = run(method, given)
    for b in range(2):
        expected = [
            (i + f * N, x, s)
            for f in range(FRAMES)
            for i, x, s in one_frame(given["hidden"][b, f], question(given, b), counts(N, keep, stages))
        ]
        assert index[b].tolist() == [i for i, _, _ in expected]
        np.testing.assert_allclose(size[b], [s for _, _, s in expected], rtol=1e-5)
        np.testing.assert_allclose(tokens[b], np.stack([x for _, x, _ in expected]), atol=1e-5)
    np.testing.assert_allclose(size.sum(1), FRAMES * N, rtol=1e-5)


def test_counts_of_the_paper() -> None:
    assert counts(576, 72, 3) == [288, 144, 72]
    assert counts(576, 72, 1) == [72]
    assert counts(20, 19, 3) == [19]
    assert counts(20, 20, 3) == []


def test_of_equal_tokens_a_mean_is_the_token() -> None:
    method = QgVtc(keep=4).fit(SITE)
    given = signals("equal", method)
    np.testing.assert_allclose(run(method, given)[0], given["hidden"][:, :, :4].reshape(2, -1, DIM), rtol=1e-5)


def test_padding_text_changes_nothing() -> None:
    method = QgVtc(keep=7, weights="layer.safetensors").fit(SITE)
    given = signals("random", method)
    other = given | {"text": np.where(given["text_mask"][..., None] > 0, given["text"], 1e4).astype(np.float32)}
    assert (run(method, given)[0] == run(method, other)[0]).all()


def test_keeping_all_is_the_identity() -> None:
    method = QgVtc(keep_ratio=1).fit(SITE)
    given = signals("random", method)
    tokens, index, size = run(method, given)
    assert (tokens == given["hidden"].reshape(2, -1, DIM)).all()
    assert (index == np.arange(FRAMES * N)).all()
    assert (size == 1).all()


def test_the_trained_layer() -> None:
    method = QgVtc(keep=4, weights="layer.safetensors").fit(SITE)
    assert method.space == "tower"
    assert method.trained(SITE)["question_in"] == (LLM_DIM, DIM)
    assert QgVtc(keep=4).space == "llm"
    assert QgVtc(keep=4).fit(SITE).trained(SITE) == {}
    with pytest.raises(ReductionError, match="`weights` need the widths"):
        QgVtc(keep=4, weights="layer.safetensors").fit(dataclasses.replace(SITE, llm_dim=0))
    with pytest.raises(ReductionError, match="`stages` must be at least 1; found 0"):
        QgVtc(keep=4, stages=0).fit(SITE)
