"""TRIM against a loop over tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphs._contract import ReductionError
from graphs.trim import Trim
from tests.graphs.oracle import GUIDED, GUIDED_BY_CLIP, KINDS, Array, best, cosine, grid, guided, run_merging

N, FRAMES, DIM = GUIDED.tokens, GUIDED.frames, 8
LLM, CLIP = GUIDED, GUIDED_BY_CLIP


def one_frame(given: dict[str, Array], b: int, f: int, keep: int, text: str, sign: str) -> list[Any]:
    """(index, token, size) per kept token."""
    hidden = given["hidden"][b, f]
    if text == "clip":
        x, question = (v.astype(np.float64) for v in (given["aligned"][b, f], given["aligned_text"][b]))
        unit = np.sqrt((x**2).sum(-1).mean() * (question**2).sum())
        score = [grid(token @ question, unit) for token in x]
    else:
        mean = given["text"][b][given["text_mask"][b] > 0].mean(0)
        score = [grid(cosine(token, mean)) for token in hidden]
    kept = sorted(best([-s if sign == "lowest" else s for s in score], keep - 1))
    rest = [i for i in range(N) if i not in kept]
    return [(i, hidden[i], 1) for i in kept] + [(rest[-1], hidden[rest].mean(0), len(rest))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 2, 9, N])
@pytest.mark.parametrize("text", ["clip", "llm"])
@pytest.mark.parametrize("sign", ["lowest", "highest"])
def test_against_the_definition(kind: str, keep: int, text: Any, sign: Any) -> None:
    given = guided(kind, DIM)
    tokens, index, size = run_merging(Trim(keep=keep, text=text, sign=sign).fit(CLIP), given)
    for b in range(2):
        expected = [
            (i + f * N, token, s) for f in range(FRAMES) for i, token, s in one_frame(given, b, f, keep, text, sign)
        ]
        assert index[b].tolist() == [i for i, _, _ in expected]
        assert size[b].tolist() == [s for _, _, s in expected]
        np.testing.assert_allclose(tokens[b], np.stack([t for _, t, _ in expected]), atol=1e-6)


def test_keeping_all_changes_no_token() -> None:
    given = guided("random", DIM)
    tokens, index, size = run_merging(Trim(keep_ratio=1).fit(LLM), given)
    assert (np.sort(index) == np.arange(FRAMES * N)).all()
    for b in range(2):
        assert (tokens[b] == given["hidden"][b].reshape(-1, DIM)[index[b]]).all()
    assert (size == 1).all()


def test_the_sign_turns_the_order_round() -> None:
    given = guided("random", DIM)
    low, high = (
        set(run_merging(Trim(keep=11, sign=s).fit(CLIP), given)[1][0, :10].tolist()) for s in ("lowest", "highest")
    )
    assert low | high == set(range(N))


def test_padding_text_changes_nothing() -> None:
    given = guided("random", DIM)
    other = given | {"text": np.where(given["text_mask"][..., None] > 0, given["text"], 1e4).astype(np.float32)}
    method = Trim(keep=7).fit(LLM)
    assert (run_merging(method, given)[0] == run_merging(method, other)[0]).all()


def test_auto_follows_the_site() -> None:
    clip, llm = Trim(keep=7).fit(CLIP), Trim(keep=7).fit(LLM)
    assert (clip.text, clip.sign, clip.space) == ("clip", "lowest", "tower")
    assert (llm.text, llm.sign, llm.space) == ("llm", "highest", "llm")
    with pytest.raises(ReductionError, match="needs `aligned`, `aligned_text`"):
        Trim(keep=7, text="clip").fit(LLM)
