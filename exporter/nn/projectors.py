"""What lies between tower and language model, token by token. Parameter names are those of Hugging Face's modules."""

from __future__ import annotations

from torch import Tensor, nn

from exporter.nn.layers import ACTIVATIONS, LayerNorm, Linear


class Projector(nn.Module):
    """LLaVA's two-layer MLP from tower width to the language model's."""

    def __init__(self, inputs: int, outputs: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, outputs, bias)
        self.linear_2 = Linear(outputs, outputs, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class NormedProjector(Projector):
    """InternVL's: a layer norm in front."""

    def __init__(self, inputs: int, outputs: int, activation: str) -> None:
        super().__init__(inputs, outputs, activation, bias=True)
        self.layer_norm = LayerNorm(inputs, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.layer_norm(x))


class Projection(nn.Module):
    """One linear layer, under the name that the checkpoint has for it."""

    def __init__(self, name: str, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.add_module(name, Linear(inputs, outputs, bias))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.get_submodule(self.name)(x)
        return out
