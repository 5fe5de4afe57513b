"""LLaVolta's pooling against a loop written from the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.llavolta import Llavolta
from tests.graphs.oracle import KINDS, features

SITE = Site(12, 2, (3, 4), frozenset({"hidden"}), 32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 3, 5, 8, 12, 17, 24])
def test_against_the_paper(kind: str, keep: int) -> None:
    hidden = features(kind, (2, 24, 5))
    size = np.random.default_rng(5).integers(1, 4, (2, 24)).astype(np.float32)
    method = Llavolta(keep=keep).fit(SITE)
    out = method.forward(2, {"hidden": torch.from_numpy(hidden), "size": torch.from_numpy(size)})
    assert out.size is not None
    end = 0
    for run in range(keep):
        members = [i for i in range(24) if run * 24 // keep <= i < (run + 1) * 24 // keep]
        assert members[0] == end
        end = members[-1] + 1
        assert len(members) in (24 // keep, 24 // keep + 1)
        assert out.index[:, run].tolist() == 2 * [int(np.mean(members))]
        assert out.size[:, run].tolist() == size[:, members].sum(1).tolist()
        np.testing.assert_allclose(out.tokens[:, run].numpy(), hidden[:, members].mean(1, dtype=np.float64), atol=1e-6)
    assert end == 24
    if keep == 24:
        assert (out.tokens.numpy() == hidden).all()


@pytest.mark.parametrize("stride", [1, 2, 3, 8])
def test_is_average_pooling_where_the_stride_divides(stride: int) -> None:
    hidden = torch.from_numpy(features("random", (2, 24, 5)))
    out = Llavolta(stride=stride).fit(SITE).forward(2, {"hidden": hidden, "size": torch.ones(2, 24)})
    pooled = torch.nn.functional.avg_pool1d(hidden.transpose(1, 2), stride, stride).transpose(1, 2)
    torch.testing.assert_close(out.tokens, pooled, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("method", "keep"),
    [
        (Llavolta(), 3),
        (Llavolta(stride=5), 4),
        (Llavolta(keep_ratio=0.3), 7),
        (Llavolta(keep=10), 10),
        (Llavolta(stride=24), 1),
    ],
)
def test_counts(method: Llavolta, keep: int) -> None:
    fitted = method.fit(SITE)
    assert (fitted.layers, fitted.keep, fitted.position) == ((2,), keep, "keep")
    assert fitted.fit(SITE) == fitted


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Llavolta(stride=2, keep=12), "`stride` = 2 says how many tokens stay; leave out `keep`"),
        (Llavolta(stride=2, keep_ratio=0.5), "says how many"),
        (Llavolta(stride=25), r"`stride` must be in 1..24, as there are 24 visual tokens .* found 25"),
        (Llavolta(stride=0), "found 0"),
    ],
)
def test_refusals(method: Llavolta, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(SITE)


def test_float16_accumulates_in_float32() -> None:
    hidden = torch.from_numpy(features("random", (2, 24, 5))).half() * 1000
    method = Llavolta(keep=2).fit(SITE)
    narrow = method.forward(2, {"hidden": hidden, "size": torch.ones(2, 24)}).tokens
    wide = method.forward(2, {"hidden": hidden.float(), "size": torch.ones(2, 24)}).tokens
    assert narrow.dtype == torch.float16
    assert torch.equal(narrow, wide.half())
