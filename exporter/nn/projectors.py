"""What lies between tower and language model, token by token. Parameter names are those of Hugging Face's modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporter.nn.layers import ACTIVATIONS, LayerNorm, Linear, RMSNorm


class Projector(nn.Module):
    """LLaVA's two-layer MLP from tower width to the language model's."""

    def __init__(self, inputs: int, outputs: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, outputs, bias)
        self.linear_2 = Linear(outputs, outputs, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class RowProjector(Projector):
    """LLaVA-NeXT's: the same, and the learned vector that ends a row of tokens."""

    def __init__(self, inputs: int, outputs: int, activation: str, bias: bool) -> None:
        super().__init__(inputs, outputs, activation, bias)
        self.image_newline = nn.Parameter(torch.empty(outputs), requires_grad=False)


class RowEnds(nn.Module):
    """Nothing but the learned vector: what comes is projected already."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.image_newline = nn.Parameter(torch.empty(outputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


class NormedProjector(Projector):
    """InternVL's: a layer norm in front."""

    def __init__(self, inputs: int, outputs: int, activation: str) -> None:
        super().__init__(inputs, outputs, activation, bias=True)
        self.layer_norm = LayerNorm(inputs, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.layer_norm(x))


class SoftProjector(nn.Module):
    """Gemma 3's: an RMS norm whose weights lack 1, and a matrix that lies as it is used."""

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.mm_soft_emb_norm = RMSNorm(inputs, eps, offset=1.0)
        self.mm_input_projection_weight = nn.Parameter(torch.empty(inputs, outputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mm_soft_emb_norm(x) @ self.mm_input_projection_weight


class MergingProjector(Projector):
    """Mistral 3's: every patch of a token is normed, and a matrix makes them one, channel by channel."""

    def __init__(self, inputs: int, outputs: int, merge: int, eps: float, activation: str, bias: bool) -> None:
        super().__init__(inputs, outputs, activation, bias)
        self.norm = RMSNorm(inputs, eps)
        self.patch_merger = nn.ModuleDict({"merging_layer": Linear(inputs * merge**2, inputs, bias=False)})
        self.merge = merge

    def forward(self, x: Tensor) -> Tensor:
        patches = self.norm(x.unflatten(-1, (self.merge**2, -1)))
        return super().forward(self.patch_merger["merging_layer"](patches.transpose(-1, -2).flatten(-2)))


class Projection(nn.Module):
    """One linear layer, under the name that the checkpoint has for it."""

    def __init__(self, name: str, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.add_module(name, Linear(inputs, outputs, bias))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.get_submodule(self.name)(x)
        return out
