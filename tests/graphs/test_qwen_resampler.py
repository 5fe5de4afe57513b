from __future__ import annotations

import pytest
import torch
from torch import nn

from graphs._contract import ReductionError, Site
from graphs.qwen_resampler import QwenResampler
from tests.graphs.compressing import close, normal, weights_of

SITE = Site(20, 2, (4, 5), frozenset({"hidden"}), dim=8, llm_dim=12)


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """Qwen-VL: OpenCLIP ViT-bigG 1664 wide on 448 pixels, language model 4096 wide."""
    published = {
        "transformer.visual.attn_pool.query": (256, 4096),
        "transformer.visual.attn_pool.pos_embed": (256, 4096),
        "transformer.visual.attn_pool.kv_proj.weight": (4096, 1664),
        "transformer.visual.attn_pool.attn.in_proj_weight": (12288, 4096),
        "transformer.visual.attn_pool.attn.in_proj_bias": (12288,),
        "transformer.visual.attn_pool.attn.out_proj.weight": (4096, 4096),
        "transformer.visual.attn_pool.attn.out_proj.bias": (4096,),
        "transformer.visual.attn_pool.ln_q.weight": (4096,),
        "transformer.visual.attn_pool.ln_q.bias": (4096,),
        "transformer.visual.attn_pool.ln_kv.weight": (4096,),
        "transformer.visual.attn_pool.ln_kv.bias": (4096,),
        "transformer.visual.ln_post.weight": (4096,),
        "transformer.visual.ln_post.bias": (4096,),
        "transformer.visual.proj": (4096, 4096),
    }
    site = Site(1024, 1, (32, 32), SITE.signals, dim=1664, llm_dim=4096)
    method = QwenResampler().fit(site)
    assert {QwenResampler.prefixes[1] + name: shape for name, shape in method.trained(site).items()} == published
    assert method.heads == 32
    after = method.after(site)
    assert (after.tokens, after.grid, after.dim) == (256, None, 4096)


class Reference(nn.Module):
    """The paper's, of PyTorch's own modules."""

    def __init__(self, queries: int, heads: int, dim: int, llm_dim: int) -> None:
        super().__init__()
        pool = nn.Module()
        pool.query, pool.pos_embed = (nn.Parameter(torch.zeros(queries, llm_dim)) for _ in range(2))
        pool.kv_proj = nn.Linear(dim, llm_dim, bias=False) if dim != llm_dim else nn.Identity()
        pool.attn = nn.MultiheadAttention(llm_dim, heads, batch_first=True)
        pool.ln_q, pool.ln_kv = nn.LayerNorm(llm_dim, 1e-6), nn.LayerNorm(llm_dim, 1e-6)
        self.attn_pool, self.ln_post = pool, nn.LayerNorm(llm_dim, 1e-6)
        self.proj = nn.Parameter(torch.zeros(llm_dim, llm_dim))

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        pool, side = self.attn_pool, round(len(self.attn_pool.query) ** 0.5)
        planes = pool.pos_embed.t().reshape(1, -1, side, side)
        at = nn.functional.interpolate(planes, grid, mode="bicubic", align_corners=False)[0].flatten(1).t()
        x = pool.ln_kv(pool.kv_proj(x))
        query = (pool.ln_q(pool.query) + pool.pos_embed).expand(len(x), -1, -1)
        return self.ln_post(pool.attn(query, x + at, x)[0]) @ self.proj


@pytest.mark.parametrize(("grid", "dim", "heads"), [((4, 5), 8, 3), ((3, 3), 8, None), ((6, 7), 12, 2)])
@torch.no_grad()
def test_against_pytorch(grid: tuple[int, int], dim: int, heads: int | None) -> None:
    """The queries' grid of 3 × 3 made larger, left as it is, and no layer where tower and language model are alike."""
    site = Site(grid[0] * grid[1], 2, grid, SITE.signals, dim=dim, llm_dim=12)
    method = QwenResampler(queries=9, heads=heads).fit(site)
    weights, x = weights_of(method, site), normal(2, 2, site.tokens, dim)
    reference = Reference(9, heads or 1, dim, 12)
    reference.load_state_dict(weights)
    found = method.forward({"hidden": x, **weights}, site)
    close(found, reference(x.flatten(0, 1), grid).unflatten(0, (2, 2)))


@pytest.mark.parametrize(
    ("method", "grid", "words"),
    [
        (QwenResampler(queries=8), (4, 5), "square number, as they lie on a grid; found 8"),
        (QwenResampler(queries=25), (4, 5), "would yield 50 tokens where there are 40"),
        (QwenResampler(queries=4, heads=5), (4, 5), "must divide the width 12"),
        (QwenResampler(queries=4), None, "whole raster"),
    ],
)
def test_what_does_not_fit(method: QwenResampler, grid: tuple[int, int] | None, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        method.fit(Site(20, 2, grid, SITE.signals, dim=8, llm_dim=12))
