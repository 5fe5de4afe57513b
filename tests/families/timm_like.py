"""timm's FastViT in inference mode, after its published structure, for a test without timm: what transformers wraps as FastVLM's
tower. Written with torch's own layers, and sharing nothing with ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutput

MAKE = AutoModel.from_config


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


class MobileOne(nn.Module):
    def __init__(self, *shape: Any, act: bool = True, se: bool = False, **kind: Any) -> None:
        super().__init__()
        self.reparam_conv = conv(*shape, **kind)
        width = self.reparam_conv.out_channels
        self.se = SqueezeExcite(width) if se else nn.Identity()
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.act(self.se(self.reparam_conv(x)))


class SqueezeExcite(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = conv(dim, dim // 16, 1), conv(dim // 16, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        self.conv.add_module("conv", conv(dim, dim, 7, groups=dim, bias=False))
        self.conv.add_module("bn", nn.BatchNorm2d(dim))
        self.fc1, self.fc2 = conv(dim, hidden, 1), conv(hidden, dim, 1)

    def forward(self, x: Tensor) -> Any:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class Gamma(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MixerBlock(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.token_mixer = MobileOne(dim, dim, 3, groups=dim, act=False)
        self.mlp, self.layer_scale = Mlp(dim, hidden), Gamma(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale(self.mlp(x))


class AttentionBlock(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, 1e-5)
        self.token_mixer = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, bias=False), "proj": nn.Linear(dim, dim)})
        self.layer_scale_1, self.layer_scale_2, self.mlp = Gamma(dim), Gamma(dim), Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        n, dim, rows, cols = x.shape
        normed = self.norm(x.permute(0, 2, 3, 1)).reshape(n, rows * cols, dim)
        qkv = self.token_mixer["qkv"](normed).reshape(n, rows * cols, 3, dim // 32, 32).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(n, rows * cols, dim)
        x = x + self.layer_scale_1(self.token_mixer["proj"](out).permute(0, 2, 1).reshape(x.shape))
        return x + self.layer_scale_2(self.mlp(x))


class FastVit(nn.Module):
    """`layers`, `embed_dims`: as timm's; the last two of five stages attend."""

    def __init__(self, layers: list[int], embed_dims: list[int], **_: Any) -> None:
        super().__init__()
        first = embed_dims[0]
        self.stem = nn.Sequential(
            MobileOne(3, first, 3, 2), MobileOne(first, first, 3, 2, groups=first), MobileOne(first, first, 1)
        )
        self.stages = nn.Sequential()
        for i, (dim, depth) in enumerate(zip(embed_dims, layers, strict=True)):
            stage, before = nn.Sequential(), embed_dims[max(0, i - 1)]
            if i:
                down = nn.Module()
                down.add_module(
                    "proj", nn.Sequential(MobileOne(before, dim, 7, 2, groups=before), MobileOne(dim, dim, 1))
                )
                down.forward = down.proj.forward  # type: ignore[method-assign, union-attr, assignment]
                stage.add_module("downsample", down)
            if i >= 3:
                stage.add_module("pos_emb", MobileOne(dim, dim, 7, groups=dim, act=False))
            kind = AttentionBlock if i >= 3 else MixerBlock
            stage.add_module("blocks", nn.Sequential(*(kind(dim, 4 * dim) for _ in range(depth))))
            self.stages.append(stage)
        last = embed_dims[-1]
        self.final_conv = MobileOne(last, 2 * last, 3, groups=last, se=True)

    def forward(self, x: Tensor) -> Any:
        return self.final_conv(self.stages(self.stem(x)))


class TimmWrapper(nn.Module):
    """As transformers' of the same name, as far as FastVLM uses it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.timm_model = FastVit(**config.model_args)

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.timm_model(pixel_values))


def from_config(config: Any, **more: Any) -> Any:
    """What `AutoModel.from_config` would make, had it timm."""
    return TimmWrapper(config) if config.model_type == "timm_wrapper" else MAKE(config, **more)


@torch.no_grad()
def tame(model: nn.Module) -> None:
    """Convolutions that keep the size of what they get, and statistics that a training could have left."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
