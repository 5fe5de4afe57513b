from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from graphs._contract import ReductionError, Site
from graphs.tokenpacker import TokenPacker
from tests.graphs.compressing import close, normal, weights_of

PATCHES = frozenset(f"patches@{b}" for b in range(5))
SITE = Site(24, 2, (4, 6), PATCHES | {"hidden"}, 5, dim=8, patch_dim=6, llm_dim=12)


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """TokenPacker-7B: CLIP-L of 336 pixels, language model 4096 wide."""
    published = {
        "model.mm_projector.q_proj_1.weight": (1024, 1024),
        "model.mm_projector.k_proj_1.0.weight": (1024, 4096),
        "model.mm_projector.k_proj_1.0.bias": (1024,),
        "model.mm_projector.k_proj_1.2.weight": (1024, 1024),
        "model.mm_projector.k_proj_1.2.bias": (1024,),
        "model.mm_projector.v_proj_1.0.weight": (1024, 4096),
        "model.mm_projector.v_proj_1.0.bias": (1024,),
        "model.mm_projector.v_proj_1.2.weight": (1024, 1024),
        "model.mm_projector.v_proj_1.2.bias": (1024,),
        "model.mm_projector.ln_q_1.weight": (1024,),
        "model.mm_projector.ln_q_1.bias": (1024,),
        "model.mm_projector.ln_k_1.weight": (1024,),
        "model.mm_projector.ln_k_1.bias": (1024,),
        "model.mm_projector.ln_v_1.weight": (1024,),
        "model.mm_projector.ln_v_1.bias": (1024,),
        "model.mm_projector.clip_attn.in_proj_weight": (3072, 1024),
        "model.mm_projector.clip_attn.in_proj_bias": (3072,),
        "model.mm_projector.clip_attn.out_proj.weight": (1024, 1024),
        "model.mm_projector.clip_attn.out_proj.bias": (1024,),
        "model.mm_projector.mlp.0.weight": (4096, 1024),
        "model.mm_projector.mlp.0.bias": (4096,),
        "model.mm_projector.mlp.2.weight": (4096, 4096),
        "model.mm_projector.mlp.2.bias": (4096,),
    }
    signals = frozenset({"hidden", *(f"patches@{b}" for b in range(23))})
    site = Site(576, 1, (24, 24), signals, 23, dim=1024, patch_dim=1024, llm_dim=4096)
    for scale, count in ((2, 144), (3, 64), (4, 36)):
        method = TokenPacker(scale).fit(site)
        assert {TokenPacker.prefixes[1] + name: shape for name, shape in method.trained(site).items()} == published
        assert method.blocks == (11, 15, 21, 22), "hidden states 12, 16, 22 and 23 are the outputs of the blocks before"
        assert method.heads == 8
        assert method.after(site).tokens == count


class Reference(nn.Module):
    """The paper's, of PyTorch's own modules, cell by cell."""

    def __init__(
        self, scale: int, levels: int, heads: int, dim: int = 8, patch_dim: int = 6, llm_dim: int = 12
    ) -> None:
        super().__init__()
        self.q_proj_1 = nn.Linear(dim, dim, bias=False)
        self.k_proj_1, self.v_proj_1 = (
            nn.Sequential(nn.Linear(patch_dim * levels, dim), nn.GELU(), nn.Linear(dim, dim)) for _ in range(2)
        )
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(dim, 1e-6) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))
        self.scale = scale

    def forward(self, x: torch.Tensor, levels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        rows, cols = grid[0] // self.scale, grid[1] // self.scale
        coarse = nn.functional.interpolate(x.transpose(1, 2).reshape(len(x), -1, *grid), (rows, cols), mode="bilinear")
        key, value = self.ln_k_1(self.k_proj_1(levels)), self.ln_v_1(self.v_proj_1(levels))
        out = []
        for r in range(rows):
            for c in range(cols):
                query = self.ln_q_1(self.q_proj_1(coarse[:, None, :, r, c]))
                square = np.arange(grid[0] * grid[1]).reshape(grid)
                own = square[r * self.scale : (r + 1) * self.scale, c * self.scale : (c + 1) * self.scale].ravel()
                out.append(self.mlp(self.clip_attn(query, key[:, own], value[:, own])[0]))
        return torch.cat(out, 1)


@pytest.mark.parametrize(("scale", "grid", "blocks"), [(2, (4, 6), None), (3, (3, 6), (0, 2))])
@torch.no_grad()
def test_against_pytorch(scale: int, grid: tuple[int, int], blocks: tuple[int, ...] | None) -> None:
    tokens = grid[0] * grid[1]
    site = Site(tokens, 2, grid, SITE.signals, 5, dim=8, patch_dim=6, llm_dim=12)
    method = TokenPacker(scale, blocks, heads=2).fit(site)
    levels = (2, 3, 4, 4) if blocks is None else blocks
    weights, x = weights_of(method, site), normal(2, 2, tokens, 8)
    patches = {f"patches@{b}": normal(2, 2, tokens, 6, seed=2 + b) for b in range(5)}
    reference = Reference(scale, len(levels), 2)
    reference.load_state_dict(weights)
    found = method.forward({"hidden": x, **{n: patches[n] for n in method.needs[1:]}, **weights}, site)
    beside = torch.cat([patches[f"patches@{b}"] for b in levels], -1)
    close(found, reference(x.flatten(0, 1), beside.flatten(0, 1), grid).unflatten(0, (2, 2)))


def test_another_depth_has_the_same_shares() -> None:
    assert TokenPacker().fit(SITE).needs == ("hidden", "patches@2", "patches@3", "patches@4")


@pytest.mark.parametrize(
    ("method", "site", "words"),
    [
        (TokenPacker(4), SITE, "`scale` must divide both sides of 4 × 6 tokens; found 4"),
        (TokenPacker(0), SITE, "found 0"),
        (TokenPacker(heads=3), SITE, "must divide the width 8"),
        (TokenPacker(blocks=(1, 7)), SITE, "it needs `patches@7`"),
        (TokenPacker(), Site(24, 1, (4, 6), frozenset({"hidden"}), 5, dim=8, llm_dim=12), "needs `patches` of a block"),
        (TokenPacker(blocks=(1,)), Site(24, 1, None, SITE.signals, 5, dim=8, llm_dim=12), "whole raster"),
    ],
)
def test_what_does_not_fit(method: TokenPacker, site: Site, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        method.fit(site)
