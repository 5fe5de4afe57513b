from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphs._contract import ReductionError, Site
from graphs.ldp import Ldp
from tests.graphs.compressing import close, normal, weights_of

SITE = Site(24, 2, (4, 6), frozenset({"hidden"}), dim=8, llm_dim=16)


def block(name: str, dim: int, squeezed: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.block.0.0.weight": (dim, 1, 3, 3),
        f"{name}.block.0.1.weight": (dim,),
        f"{name}.block.0.1.bias": (dim,),
        f"{name}.block.1.fc1.weight": (squeezed, dim, 1, 1),
        f"{name}.block.1.fc1.bias": (squeezed,),
        f"{name}.block.1.fc2.weight": (dim, squeezed, 1, 1),
        f"{name}.block.1.fc2.bias": (dim,),
        f"{name}.block.2.0.weight": (dim, dim, 1, 1),
        f"{name}.block.2.1.weight": (dim,),
        f"{name}.block.2.1.bias": (dim,),
    }


@pytest.mark.parametrize(("dim", "squeezed"), [(2048, 512), (2560, 640)])
def test_tensors_are_those_of_the_published_checkpoints(dim: int, squeezed: int) -> None:
    """MobileVLM-1.7B and -3B: CLIP-L of 336 pixels."""
    published = {
        "model.mm_projector.model.mlp.1.weight": (dim, 1024),
        "model.mm_projector.model.mlp.1.bias": (dim,),
        "model.mm_projector.model.mlp.3.weight": (dim, dim),
        "model.mm_projector.model.mlp.3.bias": (dim,),
        **block("model.mm_projector.model.mb_block.1", dim, squeezed),
        **block("model.mm_projector.model.mb_block.2", dim, squeezed),
    }
    site = Site(576, 1, (24, 24), SITE.signals, dim=1024, llm_dim=dim)
    method = Ldp().fit(site)
    assert {Ldp.prefixes[1] + name: shape for name, shape in method.trained(site).items()} == published
    after = method.after(site)
    assert (after.tokens, after.grid, after.dim) == (144, (12, 12), dim)


class Channels(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Excite(nn.Module):
    def __init__(self, dim: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, squeezed, 1), nn.Conv2d(squeezed, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * nn.Hardsigmoid()(self.fc2(nn.ReLU()(self.fc1(nn.AdaptiveAvgPool2d(1)(x)))))


class Residual(nn.Module):
    """MobileNetV3's block where it does not expand."""

    def __init__(self, dim: int, squeezed: int, stride: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, Channels(dim), nn.Hardswish()),
            Excite(dim, squeezed),
            nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), Channels(dim)),
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x if self.stride == 1 else self.block(x)


class Reference(nn.Module):
    """The paper's, of PyTorch's own modules."""

    def __init__(self, dim: int, llm_dim: int, squeezed: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.mlp = nn.Sequential(nn.Identity(), nn.Linear(dim, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))
        self.model.mb_block = nn.Sequential(
            nn.Identity(), Residual(llm_dim, squeezed, 1), Residual(llm_dim, squeezed, 2)
        )

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        planes = self.model.mlp(x).transpose(1, 2).unflatten(2, grid)
        return self.model.mb_block(planes).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("grid", [(4, 6), (3, 5)])
@torch.no_grad()
def test_against_pytorch(grid: tuple[int, int]) -> None:
    """Odd sides are rounded up by the stride."""
    site = Site(grid[0] * grid[1], 2, grid, SITE.signals, dim=8, llm_dim=16)
    method = Ldp().fit(site)
    weights, x = weights_of(method, site), normal(2, 2, site.tokens, 8)
    reference = Reference(8, 16, 8)
    reference.load_state_dict(weights)
    found = method.forward({"hidden": x, **weights}, site)
    assert found.shape[2] == 6
    close(found, reference(x.flatten(0, 1), grid).unflatten(0, (2, 2)))


def test_what_does_not_fit() -> None:
    with pytest.raises(ReductionError, match="whole raster"):
        Ldp().fit(Site(20, 1, None, SITE.signals, dim=8, llm_dim=12))
    with pytest.raises(ReductionError, match="widths"):
        Ldp().fit(Site(24, 1, (4, 6), SITE.signals, dim=8))
