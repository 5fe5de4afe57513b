from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphs._contract import ReductionError, Site
from graphs.cabstractor import CAbstractor
from tests.graphs.compressing import close, normal, weights_of

SITE = Site(20, 2, (4, 5), frozenset({"hidden"}), dim=8, llm_dim=12)


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """Honeybee-7B with C-Abstractor, M = 144: CLIP-L of 224 pixels, language model 4096 wide."""
    published: dict[str, tuple[int, ...]] = {
        "abstractor.pos_emb": (1, 257, 1024),
        "abstractor.readout.0.weight": (4096, 1024),
        "abstractor.readout.0.bias": (4096,),
        "abstractor.readout.2.weight": (4096, 4096),
        "abstractor.readout.2.bias": (4096,),
    }
    for stage in (0, 2):
        for number in (1, 2, 3):
            block = f"abstractor.net.{stage}.b{number}"
            published |= {
                f"{block}.conv1.conv.weight": (1024, 1024, 1, 1),
                f"{block}.conv2.conv.weight": (1024, 1, 3, 3),
                f"{block}.se.fc1.weight": (256, 1024, 1, 1),
                f"{block}.se.fc1.bias": (256,),
                f"{block}.se.fc2.weight": (1024, 256, 1, 1),
                f"{block}.se.fc2.bias": (1024,),
                f"{block}.conv3.conv.weight": (1024, 1024, 1, 1),
            }
            published |= {f"{block}.conv{i}.bn.{part}": (1024,) for i in (1, 2, 3) for part in ("weight", "bias")}
    site = Site(256, 1, (16, 16), SITE.signals, dim=1024, llm_dim=4096)
    method = CAbstractor().fit(site)
    assert {CAbstractor.prefixes[1] + name: shape for name, shape in method.trained(site).items()} == published
    assert CAbstractor(cls_position=False).fit(site).trained(site)["pos_emb"] == (1, 256, 1024)
    after = method.after(site)
    assert (after.tokens, after.grid, after.dim) == (144, (12, 12), 4096)


class Channels(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def conv(inputs: int, outputs: int, side: int, groups: int = 1) -> nn.Module:
    made = nn.Module()
    made.conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, groups=groups, bias=False)
    made.bn = Channels(outputs)
    return made


class Block(nn.Module):
    """timm's RegNet bottleneck as Honeybee asks for it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.conv3 = conv(inputs, outputs, 1), conv(outputs, outputs, 1)
        self.conv2 = conv(outputs, outputs, 3, outputs)
        self.se = nn.Module()
        squeezed = round(inputs / 4)
        self.se.fc1, self.se.fc2 = nn.Conv2d(outputs, squeezed, 1), nn.Conv2d(squeezed, outputs, 1)
        if inputs != outputs:
            self.downsample = conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        silu, shortcut = nn.functional.silu, x
        for part in (self.conv1, self.conv2):
            x = silu(part.bn(part.conv(x)))
        x = x * self.se.fc2(silu(self.se.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
        if hasattr(self, "downsample"):
            shortcut = self.downsample.bn(self.downsample.conv(shortcut))
        return silu(self.conv3.bn(self.conv3.conv(x)) + shortcut)


class Reference(nn.Module):
    """The paper's, of PyTorch's own modules."""

    def __init__(self, method: CAbstractor, site: Site) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(torch.zeros(1, site.tokens + method.cls_position, site.dim))
        if method.eos:
            self.eos_tokens = nn.Parameter(torch.zeros(1, method.eos, site.llm_dim))
        first, second = (
            nn.ModuleDict({f"b{i + 1}": Block(site.dim if stage + i == 0 else method.width, method.width) for i in range(method.depth)})
            for stage in (0, 1)
        )  # fmt: skip
        self.net = nn.ModuleList([first, nn.AdaptiveAvgPool2d(method.side), second])
        self.readout = nn.Sequential(
            nn.Linear(method.width, site.llm_dim), nn.SiLU(), nn.Linear(site.llm_dim, site.llm_dim)
        )

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = (x + self.pos_emb[:, -x.shape[1] :]).transpose(1, 2).unflatten(2, grid)
        first, sampler, second = self.net
        for part in (*first.values(), sampler, *second.values()):
            x = part(x)
        x = self.readout(x.flatten(2).transpose(1, 2))
        return torch.cat([x, self.eos_tokens.expand(len(x), -1, -1)], 1) if hasattr(self, "eos_tokens") else x


@pytest.mark.parametrize(
    "method",
    [CAbstractor(queries=9, depth=2, width=16, eos=2), CAbstractor(queries=16, depth=1, width=8, cls_position=False)],
)
@torch.no_grad()
def test_against_pytorch(method: CAbstractor) -> None:
    """Cells that overlap, and vectors behind; stages of the tower's own width."""
    method = method.fit(SITE)
    weights, x = weights_of(method, SITE), normal(2, 2, 20, 8)
    reference = Reference(method, SITE)
    reference.load_state_dict(weights)
    found = method.forward({"hidden": x, **weights}, SITE)
    close(found, reference(x.flatten(0, 1), (4, 5)).unflatten(0, (2, 2)))
    assert method.after(SITE).grid == (None if method.eos else (4, 4))


@pytest.mark.parametrize(
    ("method", "grid", "words"),
    [
        (CAbstractor(queries=8), (4, 5), "`queries` must be a square number; found 8"),
        (CAbstractor(queries=25), (4, 5), "need 5 rows and columns; found 4 × 5"),
        (CAbstractor(queries=16, eos=5), (4, 5), "would yield 42 tokens where there are 40"),
        (CAbstractor(queries=4, depth=0), (4, 5), "`depth` must be at least 1"),
        (CAbstractor(queries=4), None, "whole raster"),
    ],
)
def test_what_does_not_fit(method: CAbstractor, grid: tuple[int, int] | None, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        method.fit(Site(20, 2, grid, SITE.signals, dim=8, llm_dim=12))
