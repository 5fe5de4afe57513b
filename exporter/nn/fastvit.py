"""FastViTHD, the tower of FastVLM: convolutions that halve the raster, attention in the last stages. Names are timm's, layers those
of its inference mode (branches merged into one convolution)."""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.nn.atom import Atom
from exporter.nn.layers import LayerNorm, Linear, attend, merge_heads, split_heads
from exporter.nn.specs import FastVitSpec
from exporter.nn.vit import FROM_OUTPUT, Tap, parts


class Conv(nn.Module):
    """A convolution whose output is the input's raster divided by the stride."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None
        self.stride, self.groups = stride, groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.weight.shape[-1] // 2, 1, self.groups)


class Merged(nn.Module):
    """A convolution into which branches were merged, and what follows it: squeeze and excite, GELU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, gated: bool = False, bends: bool = True
    ) -> None:  # fmt: skip
        super().__init__()
        self.reparam_conv = Conv(inputs, outputs, kernel, stride, groups)
        if gated:
            self.se = Gate(outputs)
        self.gated, self.bends = gated, bends

    def forward(self, x: Tensor) -> Tensor:
        x = self.reparam_conv(x)
        x = self.se(x) if self.gated else x
        return F.gelu(x) if self.bends else x


class Gate(nn.Module):
    """Squeeze and excite: every channel times a number between 0 and 1 that depends on the means of all."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Conv(dim, dim // 16, 1), Conv(dim // 16, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.float().mean((2, 3), keepdim=True).to(x.dtype)
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(mean))))


class BatchNorm(nn.Module):
    """With the statistics of training; a factor and a summand per channel."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_parameter(name, nn.Parameter(torch.empty(dim), requires_grad=False))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            self.get_parameter(n).float() for n in ("weight", "bias", "running_mean", "running_var")
        )
        factor = weight / torch.sqrt(var + self.eps)
        summand = bias - mean * factor
        return x * factor.to(x.dtype)[:, None, None] + summand.to(x.dtype)[:, None, None]


class ConvMlp(nn.Module):
    """A convolution per channel, then two layers."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.ModuleDict({"conv": Conv(dim, dim, 7, groups=dim, bias=False), "bn": BatchNorm(dim)})
        self.fc1, self.fc2 = Conv(dim, hidden, 1), Conv(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv["bn"](self.conv["conv"](x)))))


class Scale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Stem(Atom):
    """[batch, frames, 3, height, width] → [batch * frames, dim, height / 4, width / 4]"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        for i, layer in enumerate((Merged(3, dim, 3, 2), Merged(dim, dim, 3, 2, dim), Merged(dim, dim, 1))):
            self.add_module(str(i), layer)
        self.dim = dim

    def key(self) -> Hashable:
        return self.dim

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values.flatten(0, 1)
        for layer in self.children():
            x = layer(x)
        return x


class Downsample(Atom):
    """[n, inputs, rows, cols] → [n, outputs, rows / 2, cols / 2]"""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(Merged(inputs, outputs, 7, 2, inputs), Merged(outputs, outputs, 1))
        self.widths = inputs, outputs

    def key(self) -> Hashable:
        return self.widths

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.proj(x)
        return found


class Positions(Atom):
    """What a token's neighbours say about its place, added."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reparam_conv = Conv(dim, dim, 7, groups=dim)
        self.dim = dim

    def key(self) -> Hashable:
        return self.dim

    def forward(self, x: Tensor) -> Tensor:
        return self.reparam_conv(x)


class Mixing(Atom):
    """A block without attention: x [n, dim, rows, cols] → x."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.token_mixer = Merged(dim, dim, 3, groups=dim, bends=False)
        self.mlp, self.layer_scale = ConvMlp(dim, hidden), Scale(dim)
        self.widths = dim, hidden

    def key(self) -> Hashable:
        return self.widths

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale(self.mlp(x))


class Attending(Atom):
    """A block with attention: x [n, dim, rows, cols] → x, and the q, k [n, heads, tokens, head_dim] of its attention."""

    def __init__(self, dim: int, hidden: int, head_dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, 1e-5)
        self.token_mixer = nn.ModuleDict({"qkv": Linear(dim, 3 * dim, bias=False), "proj": Linear(dim, dim)})
        self.layer_scale_1, self.mlp, self.layer_scale_2 = Scale(dim), ConvMlp(dim, hidden), Scale(dim)
        self.heads, self.widths = dim // head_dim, (dim, hidden, head_dim)

    def key(self) -> Hashable:
        return self.widths

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = (split_heads(part, self.heads) for part in self.token_mixer["qkv"](normed).chunk(3, -1))
        out = self.token_mixer["proj"](merge_heads(attend(q, k, v)))
        x = x + self.layer_scale_1(out.transpose(1, 2).unflatten(2, x.shape[2:]))
        return x + self.layer_scale_2(self.mlp(x)), q, k


class Last(Atom, Merged):
    """The convolution that widens: [n, dim, rows, cols] → [n, tokens, out]."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim, out, 3, groups=dim, gated=True)
        self.widths = dim, out

    def key(self) -> Hashable:
        return self.widths

    def forward(self, x: Tensor) -> Tensor:
        return Merged.forward(self, x).flatten(2).transpose(1, 2)


class FastVit(nn.Module):
    """The whole tower. Taps as in `exporter.nn.vit.Vit`; its blocks are those of the last stage."""

    def __init__(self, spec: FastVitSpec, taps: tuple[str, ...], frames: int) -> None:
        super().__init__()
        self.spec, self.taps = spec, taps
        self.stem = Stem(spec.widths[0])
        self.stages = nn.ModuleList()
        inputs = spec.widths[0]
        for number, (dim, depth, attends) in enumerate(zip(spec.widths, spec.depths, spec.attends, strict=True)):
            stage = nn.Module()
            if number:
                stage.add_module("downsample", Downsample(inputs, dim))
            if attends:
                stage.add_module("pos_emb", Positions(dim))
            hidden = dim * spec.ratios[number]
            blocks = (Attending(dim, hidden, spec.head_dim) if attends else Mixing(dim, hidden) for _ in range(depth))
            stage.add_module("blocks", nn.ModuleList(blocks))
            self.stages.append(stage)
            inputs = dim
        self.final_conv = Last(inputs, spec.dim)
        for name in taps:
            self.add_module(f"tap_{name}", Tap(spec, parts(name, spec)[0], frames))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """pixel_values [batch, frames, 3, height, width] → the taps in order, leading axes [batch, frames]."""
        x = self.stem(pixel_values)
        seen: list[tuple[Tensor, Tensor]] = []
        for stage in self.stages:
            for name, child in stage.named_children():
                if name != "blocks":
                    x = child(x)
            seen = []
            for block in stage.get_submodule("blocks").children():
                if isinstance(block, Attending):
                    x, q, k = block(x)
                    seen.append((q, k))
                else:
                    x = block(x)
        x = self.final_conv(x)
        found = []
        for name in self.taps:
            kind, at = parts(name, self.spec)
            found.append(self.get_submodule(f"tap_{name}")(*((x,) if kind in FROM_OUTPUT else seen[at])))
        return found
