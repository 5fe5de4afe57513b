"""Linear, norms, activations and attention, written for export: small graphs that every parser takes and fuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -30000.0
"""Additive bias of a masked score: exp() is 0 in float32, and it still fits float16."""


class Linear(nn.Module):
    """x @ weight + bias with weight [in, out] (transposed against torch.nn.Linear)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight
        return x if self.bias is None else x + self.bias


class PackedLinear(Linear):
    """Several linear layers of one input as one matrix: a third of the launches, and what a bandwidth gives is used better.

    Args:
        parts: the layers' names in the checkpoint, where they lie beside one another, and their widths.
    """

    def __init__(self, inputs: int, parts: Mapping[str, int], bias: bool = True) -> None:
        super().__init__(inputs, sum(parts.values()), bias)
        self.parts = dict(parts)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each of them makes of x."""
        found: tuple[Tensor, ...] = self(x).split(list(self.parts.values()), -1)
        return found


def add_parameters(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give a module parameters of these names; where there are dots, in modules of its own, as in a checkpoint."""
    for name, shape in shapes.items():
        owner, (*path, leaf) = module, name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.empty(shape), requires_grad=False))


class RMSNorm(nn.Module):
    """Root-mean-square norm; statistics in float32, in the op order that ONNX Runtime fuses (Pow, not Mul).

    Args:
        offset: the checkpoint holds weight - offset; what is added when it is read (`exporter.weights`) is not in the graph.
    """

    def __init__(self, dim: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class LayerNorm(nn.Module):
    """Layer norm in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, self.eps).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.relu(x),
    "silu": lambda x: x * torch.sigmoid(x),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": lambda x: F.gelu(x),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}
"""Activations by their name in a Hugging Face config."""


class Mlp(nn.Module):
    """Two layers, no gate."""

    def __init__(self, hidden: int, intermediate: int, activation: str) -> None:
        super().__init__()
        self.fc1 = Linear(hidden, intermediate)
        self.fc2 = Linear(intermediate, hidden)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Bent to stay between -cap and cap, in float32; x itself if there is no cap."""
    return x if cap is None else torch.tanh(x.float() / cap) * cap


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim] -> [batch, tokens, heads * head_dim]"""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, softmax in float32.

    Args:
        q: [batch, heads, queries, head_dim]. k, v: [batch, heads, keys, head_dim].
        bias: added to the scores, broadcast to [batch, heads, queries, keys].
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores.float(), -1).to(v.dtype) @ v


def attention_map(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention probabilities averaged over heads, float32 [batch, queries, keys]; recomputed, so that the fused
    attention of the block stays fused."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores.float(), -1).mean(1)


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotary embedding, half-split layout. x [batch, heads, tokens, head_dim]; cos, sin broadcast [.., tokens, head_dim / 2], None
    where a model turns nothing."""
    if cos is None or sin is None:
        return x
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
