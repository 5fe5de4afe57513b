"""The tracer's optimizer may shorten a graph, never change what it computes."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from exporter.stages._trace import trace


class Unit(torch.nn.Module):
    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).sum(-1, keepdim=True) + self.epsilon).sqrt()


class Scaled(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 1.000001 - x) * 1e6


def run(model: ir.Model, x: Tensor) -> Tensor:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("epsilon", [1e-12, 1e-8, 1e-5])
def test_a_small_epsilon_stays(epsilon: float) -> None:
    """A rewriter that takes x + 1e-12 for x leaves 0 / 0."""
    x, module = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), Unit(epsilon)
    found = run(trace(module, {"x": x}, {"x": {0: "batch"}}, ["y"]), x)
    torch.testing.assert_close(found, module(x))


def test_a_factor_near_one_stays() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = run(trace(Scaled(), {"x": x}, {"x": {0: "batch"}}, ["y"]), x)
    torch.testing.assert_close(found, Scaled()(x))
    assert (found > 0.5).all()
