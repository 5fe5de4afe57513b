"""Where reductions inside the language model act, and how many tokens stay there."""

from __future__ import annotations

import pytest

from graphs._contract import InLLM, ReductionError, Site
from graphs._layers import counts_of, layers_of
from graphs.pdrop import PyramidDrop
from graphs.vscan_l import VScanL

SIGNALS = frozenset({"next_row", "plain_row"})


@pytest.mark.parametrize("paper", [(16,), (2,), (8, 16, 24), (3, 7, 16), (8, 16)])
def test_layers_keep_their_part_of_the_depth(paper: tuple[int, ...]) -> None:
    assert layers_of(Site(1, depth=32), "x", None, paper) == paper
    assert layers_of(Site(1, depth=64), "x", None, paper) == tuple(2 * layer for layer in paper)
    for depth in range(len(paper) + 1, 81):
        layers = layers_of(Site(1, depth=depth), "x", None, paper)
        assert list(layers) == sorted(set(layers))
        assert 1 <= layers[0] <= layers[-1] < depth
        if depth >= 16:
            assert all(abs(a - b * depth / 32) <= 0.5 for a, b in zip(layers, paper, strict=True) if b * depth >= 32)
    with pytest.raises(ReductionError, match=f"the model needs at least {len(paper) + 1}; found {len(paper)}"):
        layers_of(Site(1, depth=len(paper)), "x", None, paper)


def test_counts_keep_the_papers_proportions() -> None:
    papers = [(300, 200, 118), (66, 34, 20)]
    for paper in papers:
        assert counts_of(Site(576), paper[-1], papers) == paper
        assert counts_of(Site(288, 2), paper[-1], papers) == paper
    assert counts_of(Site(576), 576, papers) == (576, 576, 576)
    assert counts_of(Site(576), 1, papers)[-1] == 1
    assert counts_of(Site(1), 1, [(1, 1)]) == (1, 1)
    for keep in range(1, 61):
        counts = counts_of(Site(20, 3), keep, [(30, 15, 7.5)])
        assert counts[-1] == keep
        assert 60 >= counts[0] >= counts[1] >= counts[2]
    assert counts_of(Site(64), 1, [(32, 16, 8)]) == (16, 4, 1), "λ = 1/4"


SITE = Site(20, 3, (4, 5), SIGNALS, 8)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (VScanL(layer=0), r"`layer` must be in 1..7, as the model has 8 decoder layers .* needs all tokens; found 0"),
        (VScanL(layer=8), "found 8"),
        (VScanL(keep=61), r"1..60, as there are 60 visual tokens in the language model; found 61"),
        (VScanL(keep=6, keep_ratio=0.1), "exactly one of"),
        (PyramidDrop(layer_list=(2, 2)), r"`layer_list` must be ascending and in 1..7.*found 2\+2"),
        (PyramidDrop(layer_list=(4, 2)), r"found 4\+2"),
        (PyramidDrop(layer_list=(2, 8)), r"found 2\+8"),
        (PyramidDrop(keep_list=(9, 8)), r"`keep_list` needs 3 counts, one for each layer; found 9\+8"),
        (PyramidDrop(keep_list=(9, 8, 10)), r"`keep_list` must descend within 1..60.*found 9\+8\+10"),
        (PyramidDrop(keep_list=(61, 8, 7)), r"found 61\+8\+7"),
        (PyramidDrop(keep_list=(9, 8, 0)), r"found 9\+8\+0"),
        (PyramidDrop(keep_list=(9, 8, 7), keep=6), r"`keep_list` = 9\+8\+7 says it all; leave out"),
        (PyramidDrop(keep_list=(9, 8, 6), keep_ratio=0.1), "says it all"),
        (PyramidDrop(keep=0), "found 0"),
    ],
)
def test_refusals(method: InLLM, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)


@pytest.mark.parametrize("method", [VScanL(), PyramidDrop(), PyramidDrop(layer_list=(1, 5), keep_list=(9, 9))])
def test_a_fitted_method_says_all(method: InLLM) -> None:
    fitted = method.fit(SITE)
    assert fitted.fit(SITE) == fitted
    assert None not in {v for k, v in fitted.knobs().items() if k != "keep_ratio"}
    assert fitted.after(SITE) == Site(fitted.kept(fitted.layers[-1]), 1, None, SIGNALS, 8)
