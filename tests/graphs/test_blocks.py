"""Shared blocks at their edges: ties, everything kept, beyond TensorRT's TopK limit."""

from __future__ import annotations

import pytest
import torch

from graphs import _blocks
from graphs._blocks import ascending, complement, placement, rank, select


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randint(0, 4, (3, 20), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_rank_beyond_the_limit_is_the_same(
    scores: torch.Tensor, k: int, largest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, kept = rank(scores, k, largest=largest), select(scores, k)
    place = placement(scores, largest=largest)
    assert all(place[b, i] == j for b in range(3) for j, i in enumerate(usual[b].tolist()))
    monkeypatch.setattr(_blocks, "TOPK_LIMIT", 0)
    assert torch.equal(rank(scores, k, largest=largest), usual)
    assert torch.equal(select(scores, k), kept)


@pytest.mark.parametrize("k", [0, 1, 7, 19, 20])
def test_complement(scores: torch.Tensor, k: int) -> None:
    index = ascending(rank(scores, k))
    rest = complement(index, 20)
    for row, other in zip(index.tolist(), rest.tolist(), strict=True):
        assert other == [i for i in range(20) if i not in row]


def test_a_zero_vector_stays_zero_in_the_graph_too() -> None:
    """An optimizer that takes x + 1e-12 for x would leave 0 / 0."""
    import numpy as np
    import onnx_ir as ir
    import onnxruntime as ort

    from exporter.stages._trace import trace
    from graphs._blocks import normalize

    class Once(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return normalize(x)

    x = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 1e-3]]])
    model = trace(Once(), {"x": torch.ones(2, 3, 2)}, {"x": {0: "batch"}})
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, [[[0, 0], [0.6, 0.8], [0, 1]]], atol=1e-6)
    np.testing.assert_allclose(normalize(x).numpy(), found, atol=1e-6)
