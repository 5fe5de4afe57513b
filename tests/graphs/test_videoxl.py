from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs._contract import ReductionError, Site
from graphs.videoxl import VideoXL
from tests.graphs.compressing import close, normal, weights_of

DIM, LLM = 8, 12
SITE = Site(24, 5, (4, 6), frozenset({"hidden"}), dim=DIM, llm_dim=LLM)


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """Video-XL-2: SigLIP of 384 pixels, language model 3584 wide."""
    published = {
        "model.sae.temporal_encoding": (4, 1152),
        "model.mm_projector.0.weight": (3584, 1152),
        "model.mm_projector.0.bias": (3584,),
        "model.mm_projector.2.weight": (3584, 3584),
        "model.mm_projector.2.bias": (3584,),
    }
    for block in ("model.sae.encoder.0", "model.sae.encoder.3"):
        published |= {f"{block}.{part}.weight": (1152, 1152, 1, 1, 1) for part in ("q", "k", "v", "proj_out")}
        published |= {f"{block}.{part}.bias": (1152,) for part in ("norm", "q", "k", "v", "proj_out")}
        published |= {f"{block}.norm.weight": (1152,)}
    for block in ("model.sae.encoder.1", "model.sae.encoder.4"):
        published |= {
            f"{block}.norm.weight": (1152,),
            f"{block}.norm.bias": (1152,),
            f"{block}.qkv.weight": (3456, 1152, 1),
            f"{block}.qkv.bias": (3456,),
            f"{block}.relative_position_k.embeddings_table": (129, 1152),
            f"{block}.relative_position_v.embeddings_table": (129, 1152),
            f"{block}.proj_out.weight": (1152, 1152, 1),
            f"{block}.proj_out.bias": (1152,),
        }
    for block in ("model.sae.encoder.2", "model.sae.encoder.5"):
        published |= {f"{block}.conv.weight": (1152, 1152, 3, 3, 3), f"{block}.conv.bias": (1152,)}
    site = Site(729, 16, (27, 27), frozenset({"hidden"}), dim=1152, llm_dim=3584)
    method = VideoXL().fit(site)
    assert {VideoXL.prefixes[1] + name: shape for name, shape in method.trained(site).items()} == published


@pytest.mark.parametrize(
    ("frames", "side", "expected"),
    [(16, 27, (4, (12, 12))), (1, 27, (1, (24, 24))), (3, 24, (1, (12, 12))), (9, 24, (3, (12, 12)))],
)
def test_published_counts(frames: int, side: int, expected: tuple[int, tuple[int, int]]) -> None:
    site = Site(side * side, frames, (side, side), frozenset({"hidden"}), dim=1152, llm_dim=3584)
    after = VideoXL().fit(site).after(site)
    assert (after.frames, after.grid) == expected


class Spatial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, DIM, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv3d(DIM, DIM, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[n, dim, frames, rows, cols], frame by frame."""
        normed = self.norm(x)
        q, k, v = (f(normed).flatten(3) for f in (self.q, self.k, self.v))
        frames = []
        for t in range(x.shape[2]):
            shares = torch.softmax(torch.einsum("nci,ncj->nij", q[:, :, t], k[:, :, t]) / DIM**0.5, -1)
            frames.append(torch.einsum("nij,ncj->nci", shares, v[:, :, t]))
        out: Tensor = x + self.proj_out(torch.stack(frames, 2).reshape(x.shape))
        return out


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings_table = nn.Parameter(torch.empty(129, DIM))


class Temporal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, DIM, eps=1e-6)
        self.qkv, self.proj_out = nn.Conv1d(DIM, 3 * DIM, 1), nn.Conv1d(DIM, DIM, 1)
        self.relative_position_k, self.relative_position_v = Table(), Table()

    def forward(self, x: Tensor) -> Tensor:
        """Place by place, score by score."""
        out, frames = x.clone(), x.shape[2]
        far_k, far_v = self.relative_position_k.embeddings_table, self.relative_position_v.embeddings_table
        for r in range(x.shape[3]):
            for c in range(x.shape[4]):
                q, k, v = self.qkv(self.norm(x[..., r, c])).chunk(3, 1)
                scores = torch.empty(x.shape[0], frames, frames)
                for i in range(frames):
                    for j in range(frames):
                        plain = (q[..., i] * k[..., j]).sum(1) / DIM**0.5
                        scores[:, i, j] = plain + (q[..., j] * far_k[64 + i - j]).sum(1) / DIM**0.25
                shares = scores.softmax(-1)
                found = torch.zeros_like(q)
                for i in range(frames):
                    for j in range(frames):
                        found[..., i] += shares[:, i, j, None] * (v[..., j] + far_v[64 + j - i])
                out[..., r, c] += self.proj_out(found)
        return out


class Halve(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(DIM, DIM, 3, stride=(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (1, 1, 1, 1, 1, 0), mode="replicate"))
        return out


class Synthesis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temporal_encoding = nn.Parameter(torch.empty(4, DIM))
        self.encoder = nn.Sequential(Spatial(), Temporal(), Halve(), Spatial(), Temporal(), Halve())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sae = Synthesis()
        self.mm_projector = nn.Sequential(nn.Linear(DIM, LLM), nn.GELU(), nn.Linear(LLM, LLM))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[frames, rows, cols, dim] of one sample → [fours, tokens, llm]"""
        frames = x.shape[0]
        planes = F.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
        while planes.shape[0] % 4:
            planes = torch.cat([planes, planes[-1:]])
        clips = planes.contiguous().view(-1, DIM, 4, *size)  # the official code's, which transposes nothing
        clips = self.sae.encoder(clips + self.sae.temporal_encoding.t()[None, :, :, None, None])[:, :, 0]
        out: Tensor = self.mm_projector(clips.flatten(2).transpose(1, 2))
        if frames > 1:
            pooled = F.avg_pool2d(out.transpose(1, 2).unflatten(2, size), 2)
            out = pooled.flatten(2).transpose(1, 2)
        return out


@pytest.mark.parametrize(("frames", "grid"), [(5, None), (4, (2, 4)), (1, None), (2, (6, 8))])
def test_against_modules_of_the_official_model(frames: int, grid: tuple[int, int] | None) -> None:
    site = dataclasses.replace(SITE, frames=frames)
    method = VideoXL(grid=grid).fit(site)
    x, named = normal(2, frames, 24, DIM), weights_of(method, site)
    model = Model()
    model.load_state_dict(named)
    with torch.no_grad():
        expected = torch.stack([model(sample.unflatten(1, (4, 6)), grid or (4, 6)) for sample in x])
    found = method.forward({"hidden": x} | named, site)
    after = method.after(site)
    assert found.shape == (2, after.frames, after.tokens, LLM)
    close(found, expected, 2e-5)


def test_what_does_not_fit() -> None:
    with pytest.raises(ReductionError, match=r"must be even for clips.*found 4\+5"):
        VideoXL().fit(dataclasses.replace(SITE, tokens=20, grid=(4, 5)))
    with pytest.raises(ReductionError, match=r"`grid` takes rows\+columns.*found 4"):
        VideoXL(grid=(4,)).fit(SITE)
    with pytest.raises(ReductionError, match="whole raster"):
        VideoXL().fit(dataclasses.replace(SITE, grid=None))
    image = dataclasses.replace(SITE, tokens=20, grid=(4, 5), frames=1)
    assert VideoXL().fit(image).after(image).tokens == 20
