"""PruneVid's part in the language model against loops written from the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import Site
from graphs.prunevid_l import PruneVidL
from tests.graphs.oracle import KINDS, Array, attention, best, grid

N, TEXT, HEADS = 24, 7, 3
SITE = Site(8, 3, (2, 4), frozenset({"head_attention", "plain_head_attention", "instruction_mask"}), 32)


def run(method: PruneVidL, paid: Array, asks: Array) -> list[list[int]]:
    hidden = torch.arange(float(N))[None, :, None].expand(len(paid), -1, 2)
    name = "head_attention" if method.rope else "plain_head_attention"
    given = {name: torch.from_numpy(paid), "instruction_mask": torch.from_numpy(asks), "hidden": hidden}
    tokens, index, size = method.forward(method.layers[0], given)
    assert size is None
    assert torch.equal(tokens[..., 0], index.float())
    found: list[list[int]] = index.tolist()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keep", "rope"), [(1, False), (10, True), (N, False)])
def test_against_the_paper(kind: str, keep: int, rope: bool) -> None:
    paid = attention(kind, (2, HEADS, TEXT, N))
    asks = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]], np.float32)
    found = run(PruneVidL(keep=keep, rope=rope).fit(SITE), paid, asks)
    for b in range(2):
        asked = [(h, t) for h in range(HEADS) for t in range(TEXT) if asks[b, t]]
        scores = [max(grid(paid[b, h, t, i], 1 / N) for h, t in asked) for i in range(N)]
        assert found[b] == sorted(best(scores, keep))


def test_what_stands_before_the_image_says_nothing() -> None:
    paid, asks = attention("random", (2, HEADS, TEXT, N)), np.zeros((2, TEXT), np.float32)
    asks[:, 4:] = 1
    method = PruneVidL(keep=5).fit(SITE)
    other = np.where(asks[:, None, :, None] > 0, paid, 1.0).astype(np.float32)
    assert run(method, paid, asks) == run(method, other, asks)
    longer = np.concatenate([np.ones((2, HEADS, 3, N), np.float32), paid], 2)
    assert run(method, longer, np.pad(asks, ((0, 0), (3, 0)))) == run(method, paid, asks)


def test_one_token_in_one_head_is_enough() -> None:
    """Of two tokens the one that a single head of a single question token wants stays, though its mean attention is less."""
    paid = np.full((1, HEADS, 2, N), 0.01, np.float32)
    paid[0, :, :, 3] = 0.1
    paid[0, 2, 1, 20] = 0.19
    assert run(PruneVidL(keep=1).fit(SITE), paid, np.ones((1, 2), np.float32)) == [[20]]


def test_the_papers_counts() -> None:
    fitted = PruneVidL().fit(SITE)
    assert (fitted.layers, fitted.keep, fitted.position) == ((11,), 10, "keep")
