"""DyRate's cuts and its classifier, against loops and against PyTorch's GRU formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.dyrate import DyRate
from tests.graphs.oracle import attention, best, grid

SITE = Site(12, frames=2, grid=(3, 4), signals=frozenset({"attention_row", "plain_row"}), depth=6)


@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
@pytest.mark.parametrize("keep", [1, 5, 24])
def test_a_cut_against_the_paper(kind: str, keep: int) -> None:
    row = attention(kind, (3, 24))
    found = DyRate(keep=24).fit(SITE).shorten(torch.from_numpy(row), keep)
    assert found.dtype == torch.int64
    for b in range(3):
        assert found[b].tolist() == sorted(best([grid(s, 1 / 24) for s in row[b]], keep))


def test_prefill_is_a_cut() -> None:
    row, hidden = torch.from_numpy(attention("random", (2, 24))), torch.arange(24.0)[None, :, None].expand(2, -1, 3)
    method = DyRate(layer=2, keep=9).fit(SITE)
    tokens, index, _ = method.forward(2, {"attention_row": row, "hidden": hidden})
    assert torch.equal(index, method.shorten(row, 9))
    assert torch.equal(tokens[..., 0], index.float())
    plain = DyRate(layer=2, keep=9, rope=False).fit(SITE).forward(2, {"plain_row": row, "hidden": hidden})
    assert torch.equal(plain.index, index)


def test_buckets() -> None:
    assert DyRate().fit(SITE).buckets == ((8, 6), (32, 3))
    assert DyRate(keep=20, step_list=(1, 2, 3), keep_list=(20, 5, 1)).fit(SITE).buckets == ((1, 20), (2, 5), (3, 1))
    method = DyRate(keep=20).fit(SITE)
    assert method.fit(SITE) == method
    assert method.after(SITE).total == 20


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(layer=0), r"`layer` must be in 1..5"),
        (dict(step_list=(0, 3)), r"`step_list` must ascend from 1 on, .* found 0\+3"),
        (dict(step_list=(3,), keep_list=(4, 2)), "one step for each of 2 counts"),
        (dict(keep=4, keep_list=(3, 5)), r"`keep_list` must descend within 1..4; found 3\+5"),
        (dict(keep=4, keep_list=(5, 1)), r"`keep_list` must descend within 1..4"),
        (dict(rates=1), "`rates` must be 2 or more"),
        (dict(state=4), "`state` is the width of a trained GRU: it needs `weights`"),
    ],
)
def test_refusals(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        DyRate(**knobs).fit(SITE)  # type: ignore[arg-type]


def weights(method: DyRate) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: 2 * torch.randn(shape, generator=draw) for name, shape in method.trained(SITE).items()}


def test_the_linear_classifier() -> None:
    method = DyRate(weights="-", rates=5)
    known = weights(method)
    shares = torch.rand(40, 4, generator=torch.Generator().manual_seed(1))
    wanted, state = method.wanted({**known, "shares": shares}, 23)
    assert state is None
    expected = []
    for row in shares.numpy():
        logits = row @ known["weight"].numpy() + known["bias"].numpy()
        rate = int(np.argmax(logits)) / 5
        expected.append(int(np.ceil((1 - rate) * 23 - 1e-9)))
    assert wanted.tolist() == expected
    assert len(set(expected)) > 1, "one rate for all shows nothing"


def test_the_gru() -> None:
    method = DyRate(weights="-", rates=5, state=3)
    known = weights(method)
    draw = torch.Generator().manual_seed(1)
    shares, before = torch.rand(40, 4, generator=draw), torch.randn(40, 3, generator=draw)
    logits, state = method.predict({**known, "shares": shares, "state": before})
    assert state is not None
    cell = torch.nn.GRUCell(4, 3)  # its candidate resets behind the matrix; ours, like the first GRU, in front of it
    with torch.no_grad():
        for i, name in enumerate(("reset", "update")):
            cell.weight_ih[3 * i : 3 * i + 3] = known[name][:4].T
            cell.weight_hh[3 * i : 3 * i + 3] = known[name][4:].T
            cell.bias_ih[3 * i : 3 * i + 3] = known[f"{name}_bias"]
        cell.weight_ih[6:], cell.bias_ih[6:] = known["candidate"][:4].T, known["candidate_bias"]
        cell.weight_hh[6:] = 0
        cell.bias_hh.zero_()
        cell.weight_hh[6:] = 0
        without = cell(shares, before)  # the candidate sees the shares alone
        reset = torch.sigmoid(torch.cat([shares, before], 1) @ known["reset"] + known["reset_bias"])
        update = torch.sigmoid(torch.cat([shares, before], 1) @ known["update"] + known["update_bias"])
        inner = shares @ known["candidate"][:4] + known["candidate_bias"]
        seen = (reset * before) @ known["candidate"][4:]
        expected = without + (1 - update) * (torch.tanh(inner + seen) - torch.tanh(inner))
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, state @ known["weight"] + known["bias"])
