from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphs._contract import ReductionError, Site
from graphs.perceiver import Perceiver
from tests.graphs.compressing import close, normal, weights_of

SITE = Site(20, 2, (4, 5), frozenset({"hidden"}), dim=8, llm_dim=12)


@pytest.mark.parametrize(
    ("method", "dim", "llm_dim", "prefix"),
    [
        (Perceiver(), 1024, 1024, "perceiver."),
        (Perceiver(latents=128, heads=16, head_dim=96), 1152, 3072, "vlm.vision_tokenizer."),
    ],
)
def test_tensors_are_those_of_the_published_checkpoints(method: Perceiver, dim: int, llm_dim: int, prefix: str) -> None:
    """OpenFlamingo-9B, whose latents are as wide as CLIP-L, and xGen-MM-phi3-mini: SigLIP-so400m, 3072 wide."""
    inner = method.heads * method.head_dim
    published = {
        f"{prefix}latents": (method.latents, dim),
        f"{prefix}norm.weight": (dim,),
        f"{prefix}norm.bias": (dim,),
    }
    for i in range(6):
        attend, feed = f"{prefix}layers.{i}.0", f"{prefix}layers.{i}.1"
        published |= {
            f"{attend}.norm_media.weight": (dim,),
            f"{attend}.norm_media.bias": (dim,),
            f"{attend}.norm_latents.weight": (dim,),
            f"{attend}.norm_latents.bias": (dim,),
            f"{attend}.to_q.weight": (inner, dim),
            f"{attend}.to_kv.weight": (2 * inner, dim),
            f"{attend}.to_out.weight": (dim, inner),
            f"{feed}.0.weight": (dim,),
            f"{feed}.0.bias": (dim,),
            f"{feed}.1.weight": (4 * dim, dim),
            f"{feed}.3.weight": (dim, 4 * dim),
        }
    if dim != llm_dim:
        published |= {f"{prefix}projection.weight": (llm_dim, dim), f"{prefix}projection.bias": (llm_dim,)}
    site = Site(729, 1, (27, 27), SITE.signals, dim=dim, llm_dim=llm_dim)
    fitted = method.fit(site)
    assert prefix in Perceiver.prefixes
    assert {prefix + name: shape for name, shape in fitted.trained(site).items()} == published
    after = fitted.after(site)
    assert (after.tokens, after.grid, after.dim) == (method.latents, None, llm_dim)


class Attention(nn.Module):
    """By PyTorch's own attention."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.heads = heads

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm_media(x), self.norm_latents(latents)
        k, v = self.to_kv(torch.cat([x, latents], 1)).tensor_split(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).movedim(2, 1) for t in (self.to_q(latents), k, v))
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).movedim(1, 2).flatten(2))


class Reference(nn.Module):
    """The paper's, of PyTorch's own modules: [batch, frames, tokens, dim], all frames as one."""

    def __init__(self, method: Perceiver, dim: int, llm_dim: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(method.latents, dim))
        if method.times is not None:
            self.frame_embs = nn.Parameter(torch.zeros(method.times, dim))
        self.layers = nn.ModuleList()
        for _ in range(method.layers):
            wide = nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
            feed = nn.Sequential(nn.LayerNorm(dim), *wide)
            self.layers.append(nn.ModuleList([Attention(dim, method.heads, method.head_dim), feed]))
        self.norm = nn.LayerNorm(dim)
        if dim != llm_dim:
            self.projection = nn.Linear(dim, llm_dim)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "frame_embs"):
            x = torch.stack([x[:, i] + self.frame_embs[i] for i in range(x.shape[1])], 1)
        x, latents = x.flatten(1, 2), self.latents.repeat(len(x), 1, 1)
        for attend, feed in self.layers:
            latents = latents + attend(x, latents)
            latents = latents + feed(latents)
        latents = self.norm(latents)
        return self.projection(latents) if hasattr(self, "projection") else latents


@pytest.mark.parametrize("llm_dim", [12, 8])
@torch.no_grad()
def test_against_pytorch(llm_dim: int) -> None:
    site = Site(20, 3, (4, 5), SITE.signals, dim=8, llm_dim=llm_dim)
    method = Perceiver(latents=5, layers=2, heads=3, head_dim=4).fit(site)
    weights, x = weights_of(method, site), normal(2, 3, 20, 8)
    reference = Reference(method, 8, llm_dim)
    reference.load_state_dict(weights)
    found = method.forward({"hidden": x, **weights}, site)
    close(found, reference(x.flatten(0, 1).unsqueeze(1)).unflatten(0, (2, 3)))


@torch.no_grad()
def test_a_clip_with_times_is_read_as_one() -> None:
    site = Site(20, 3, (4, 5), SITE.signals, dim=8, llm_dim=12)
    method = Perceiver(latents=5, layers=2, heads=3, head_dim=4, times=4).fit(site)
    weights, x = weights_of(method, site), normal(2, 3, 20, 8)
    reference = Reference(method, 8, 12)
    reference.load_state_dict(weights)
    found = method.forward({"hidden": x, **weights}, site)
    close(found, reference(x).unsqueeze(1))
    assert (method.after(site).frames, method.after(site).tokens) == (1, 5)
    swapped = method.forward({"hidden": x.flip(1), **weights}, site)
    assert (found - swapped).abs().max() > 1e-2, "the order of frames matters"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Perceiver(), "would yield 128 tokens where there are 40"),
        (Perceiver(latents=4, times=1), "too few for a clip of 2"),
        (Perceiver(latents=0), "`latents` must be at least 1; found 0"),
        (Perceiver(latents=4, heads=0), "`heads` must be at least 1; found 0"),
    ],
)
def test_what_does_not_fit(method: Perceiver, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        method.fit(SITE)
