"""The tracer may take short cuts, and its optimizer shorten a graph, but never change what it computes."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxscript import rewriter
from onnxscript.rewriter.rules.common import _no_op
from torch import Tensor

from exporter.stages import _lower, _trace
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


class Plain(torch.nn.Module):
    """All that is replaced without decomposing."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        wide = x.to(torch.float32)  # does nothing, and is an output
        here = x.to(x.device), x.to("cpu", torch.float64)
        patches = torch.nn.functional.conv2d(x[None, None], torch.ones(1, 1, 2, 1), None, 2, "valid")
        inside = ((x > 0) & (x < 2)) | (x == torch.tensor(3.0))
        by_size = torch.where(torch.eye(2, dtype=torch.bool), x.T @ x, 7.0), torch.eye(x.shape[0]) @ x
        return (
            *here,
            patches,
            wide,
            (1 - x) * inside.to(torch.float32),
            2 - inside.to(torch.int64),
            x @ torch.eye(2),
            *by_size,
        )


class Rare(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.nn.functional.conv1d(x.unsqueeze(1), torch.ones(1, 1, 3), padding="same"),)


@pytest.mark.parametrize(("module", "long_way"), [(Plain(), 0), (Rare(), 1)])
def test_only_what_needs_it_is_decomposed(
    module: torch.nn.Module, long_way: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, decompose = [], _lower._decompose
    monkeypatch.setattr(_lower, "_decompose", lambda *given: calls.append(given) or decompose(*given))
    x = torch.tensor([[-1.0, 1.0], [3.0, 4.0], [0.0, 2.0]])
    expected = module(x)
    model = trace(module, {"x": x}, {"x": {0: "batch"}}, [f"y_{i}" for i in range(len(expected))])
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for found, true in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), true, rtol=0, atol=0)
    assert len(calls) == long_way


class Mixed(torch.nn.Module):
    """Types that PyTorch promotes by itself and ONNX does not."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        count = (x > 0).sum(-1, keepdim=True)
        return count * 0.5, count + x, x / count, torch.where(x > 1, count, x) * (x > 0)


def test_types_are_promoted() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    model = trace(Mixed(), {"x": x}, {"x": {0: "batch"}}, list("abcd"))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for found, expected in zip(session.run(None, {"x": x.numpy()}), Mixed()(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected)


class Roundabout(torch.nn.Module):
    """What onnxscript's rules make shorter."""

    def forward(self, x: Tensor) -> Tensor:
        turned = x.reshape(-1, 2, 3, 2).transpose(1, 3).transpose(1, 3).reshape(-1, 12).reshape(-1, 3, 4)
        return (
            turned.relu()
            .clamp(max=2)
            .relu()
            .unsqueeze(1)
            .squeeze(1)
            .to(torch.float64)
            .to(torch.float32)[:, :, 1:][:, 1:]
        )


def test_every_rule_is_tried_where_it_can_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph as where each is tried at every node."""
    found = {}
    for how, rules in (
        ("ours", None),
        ("theirs", [r for r in rewriter._DEFAULT_REWRITE_RULES if r not in _no_op.rules]),
        ("none", []),
    ):
        if rules is not None:
            monkeypatch.setattr(_trace, "_rules", lambda rules=rules: rules)
        model = trace(Roundabout(), {"x": torch.zeros(2, 12)}, {"x": {0: "batch"}}, ["y"])
        found[how] = ir.to_proto(model).SerializeToString()
    assert found["ours"] == found["theirs"]
    assert found["ours"] != found["none"]
