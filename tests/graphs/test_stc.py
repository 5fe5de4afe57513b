from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphs._contract import ReductionError, Site
from graphs.stc import Stc
from tests.graphs.oracle import trained

SITE = Site(24, 3, (4, 6), frozenset({"hidden"}), dim=8, llm_dim=12)


def blocks(stage: str, inputs: int, outputs: int, squeezed: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """A stage of timm's RegNet, written out."""
    made: dict[str, tuple[int, ...]] = {}
    for number, narrow in enumerate(squeezed, 1):
        block = f"model.mm_projector.{stage}.b{number}"
        made |= {
            f"{block}.conv1.conv.weight": (outputs, inputs if number == 1 else outputs, 1, 1),
            f"{block}.conv2.conv.weight": (outputs, 1, 3, 3),
            f"{block}.conv3.conv.weight": (outputs, outputs, 1, 1),
            f"{block}.se.fc1.weight": (narrow, outputs, 1, 1),
            f"{block}.se.fc1.bias": (narrow,),
            f"{block}.se.fc2.weight": (outputs, narrow, 1, 1),
            f"{block}.se.fc2.bias": (outputs,),
        }
        made |= {f"{block}.conv{n}.bn.{part}": (outputs,) for n in (1, 2, 3) for part in ("weight", "bias")}
    return made


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """VideoLLaMA2-7B: CLIP-L of 336 pixels, language model 4096 wide."""
    published = {
        **blocks("s1", 1024, 4096, (256, 1024, 1024, 1024)),
        "model.mm_projector.s1.b1.downsample.conv.weight": (4096, 1024, 1, 1),
        "model.mm_projector.s1.b1.downsample.bn.weight": (4096,),
        "model.mm_projector.s1.b1.downsample.bn.bias": (4096,),
        "model.mm_projector.sampler.0.weight": (4096, 4096, 2, 2, 2),
        "model.mm_projector.sampler.0.bias": (4096,),
        **blocks("s2", 4096, 4096, (1024, 1024, 1024, 1024)),
        "model.mm_projector.readout.0.weight": (4096, 4096),
        "model.mm_projector.readout.0.bias": (4096,),
        "model.mm_projector.readout.2.weight": (4096, 4096),
        "model.mm_projector.readout.2.bias": (4096,),
    }
    site = Site(576, 8, (24, 24), frozenset({"hidden"}), dim=1024, llm_dim=4096)
    method = Stc().fit(site)
    assert {Stc.prefixes[1] + name: shape for name, shape in method.trained(site).items()} == published


@pytest.mark.parametrize(
    ("frames", "side", "method", "expected"),
    [
        (8, 24, Stc(), (5, (13, 13), 845)),
        (8, 24, Stc(padding=0), (4, (12, 12), 576)),
        (16, 27, Stc(padding=0), (8, (13, 13), 1352)),
    ],
)
def test_published_counts(frames: int, side: int, method: Stc, expected: tuple[int, tuple[int, int], int]) -> None:
    site = Site(side * side, frames, (side, side), frozenset({"hidden"}), dim=1024, llm_dim=4096)
    after = method.fit(site).after(site)
    assert (after.frames, after.grid, after.total) == expected


class ConvNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, side: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class Block(nn.Module):
    """RegNet-Y's block, of modules, on planes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(inputs, outputs), ConvNorm(outputs, outputs, 3, outputs)
        self.se = nn.ModuleDict({"fc1": nn.Conv2d(outputs, inputs // 4, 1), "fc2": nn.Conv2d(inputs // 4, outputs, 1)})
        self.conv3 = ConvNorm(outputs, outputs)
        self.downsample = ConvNorm(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        h = silu(self.conv2(silu(self.conv1(x))))
        gate = self.se["fc2"](silu(self.se["fc1"](nn.functional.adaptive_avg_pool2d(h, 1))))
        return silu(self.conv3(h * gate.sigmoid()) + self.downsample(x))


class Connector(nn.Module):
    """The paper's Figure 2, of modules, on planes."""

    def __init__(self, dim: int, out: int, padding: int) -> None:
        super().__init__()

        def stage(inputs: int) -> nn.Sequential:
            named = nn.Sequential()
            for n in range(1, 5):
                named.add_module(f"b{n}", Block(inputs if n == 1 else out, out))
            return named

        self.s1, self.s2 = stage(dim), stage(out)
        self.sampler = nn.Sequential(nn.Conv3d(out, out, 2, stride=2, padding=padding), nn.SiLU())
        self.readout = nn.Sequential(nn.Linear(out, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, frames, rows, cols, dim] → [batch, tokens, out]"""
        planes = [self.s1(frame.permute(0, 3, 1, 2)) for frame in x.unbind(1)]
        clip = self.sampler(torch.stack(planes, 2))
        planes = [self.s2(frame) for frame in clip.unbind(2)]
        out: Tensor = self.readout(torch.stack(planes, 2).flatten(2).transpose(1, 2))
        return out


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("frames", [3, 4])
def test_against_modules_of_the_paper(frames: int, padding: int) -> None:
    site = dataclasses.replace(SITE, frames=frames)
    method = Stc(padding=padding).fit(site)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, frames, 24, 8)).astype(np.float32))
    named = {name: torch.from_numpy(w) for name, w in trained(method, site).items()}
    model = Connector(8, 12, padding)
    model.load_state_dict(named)
    with torch.no_grad():
        expected = model(x.unflatten(2, (4, 6))).numpy()
    found = method.forward({"hidden": x} | named, site).flatten(1, 2).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize(
    ("site", "method", "words"),
    [
        (dataclasses.replace(SITE, grid=None), Stc(), "whole raster"),
        (dataclasses.replace(SITE, frames=1), Stc(), "at least 2 frames; found 1"),
        (dataclasses.replace(SITE, grid=(1, 24)), Stc(), "found 1 × 24 tokens"),
        (SITE, Stc(padding=2), "`padding` must be 0 or 1; found 2"),
        (dataclasses.replace(SITE, llm_dim=0), Stc(), "widths"),
    ],
)
def test_what_does_not_fit(site: Site, method: Stc, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        method.fit(site)
