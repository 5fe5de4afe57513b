from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from exporter.stages._trace import trace
from graphs._contract import ReductionError, Site
from graphs.mqt import Mqt
from tests.graphs.compressing import close, normal, weights_of

SITE = Site(20, 2, (4, 5), frozenset({"hidden"}), dim=8, llm_dim=12)


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """MQT-LLaVA-7B: CLIP-L of 336 pixels, language model 4096 wide."""
    published = {
        "model.mm_projector.query": (256, 1024),
        "model.mm_projector.pos_embed": (256, 1024),
        "model.mm_projector.attn.in_proj_weight": (3072, 1024),
        "model.mm_projector.attn.in_proj_bias": (3072,),
        "model.mm_projector.attn.out_proj.weight": (1024, 1024),
        "model.mm_projector.attn.out_proj.bias": (1024,),
        "model.mm_projector.ln_q.weight": (1024,),
        "model.mm_projector.ln_q.bias": (1024,),
        "model.mm_projector.ln_k.weight": (1024,),
        "model.mm_projector.ln_k.bias": (1024,),
        "model.mm_projector.ln_v.weight": (1024,),
        "model.mm_projector.ln_v.bias": (1024,),
        "model.mm_projector.proj": (1024, 4096),
    }
    site = Site(576, 1, (24, 24), SITE.signals, dim=1024, llm_dim=4096)
    for method, count in ((Mqt(), 256), (Mqt(keep=2), 2), (Mqt(keep_ratio=1 / 9), 64)):
        fitted = method.fit(site)
        assert {Mqt.prefixes[1] + name: shape for name, shape in fitted.trained(site).items()} == published
        assert fitted.heads == 16
        assert fitted.after(site).tokens == count


class Reference(nn.Module):
    """The paper's, of PyTorch's own modules."""

    def __init__(self, dim: int, llm_dim: int, heads: int) -> None:
        super().__init__()
        self.query, self.pos_embed = (nn.Parameter(torch.zeros(256, dim)) for _ in range(2))
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(dim, 1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.zeros(dim, llm_dim))

    def forward(self, x: torch.Tensor, grid: tuple[int, int], count: int) -> torch.Tensor:
        planes = self.pos_embed.t().reshape(1, -1, 16, 16)
        at = nn.functional.interpolate(planes, grid, mode="bicubic", align_corners=False)[0].flatten(1).t()
        query = self.ln_q(self.query[:count] + self.pos_embed[:count]).expand(len(x), -1, -1)
        return self.attn(query, self.ln_k(at).expand(len(x), -1, -1), self.ln_v(x))[0] @ self.proj


@torch.no_grad()
def test_against_pytorch() -> None:
    method = Mqt(keep=7, heads=2).fit(SITE)
    weights, x = weights_of(method, SITE), normal(2, 2, 20, 8)
    reference = Reference(8, 12, 2)
    reference.load_state_dict(weights)
    found = method.forward({"hidden": x, **weights}, SITE)
    close(found, reference(x.flatten(0, 1), (4, 5), 7).unflatten(0, (2, 2)))
    fewer = Mqt(keep=3, heads=2).fit(SITE).forward({"hidden": x, **weights}, SITE)
    close(fewer, found[:, :, :3])


class Whole(nn.Module):
    """The projector with its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.method = Mqt(keep=7).fit(SITE)
        for name, weight in weights_of(self.method, SITE).items():
            self.register_buffer(name.replace(".", "_"), weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        named = {name: self.get_buffer(name.replace(".", "_")) for name in self.method.trained(SITE)}
        return self.method.forward({"hidden": x, **named}, SITE)


def test_a_runtime_folds_the_attention(tmp_path: Path) -> None:
    model = trace(Whole(), {"x": normal(3, 2, 20, 8)}, {"x": {0: "batch"}}, ["tokens"])
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert "MatMul" in left
    assert "Softmax" not in left


@pytest.mark.parametrize(
    ("method", "site", "words"),
    [
        (Mqt(), SITE, "would yield 512 tokens where there are 40"),
        (Mqt(keep=300), Site(576, 1, (24, 24), SITE.signals, dim=8, llm_dim=12), "so many queries were trained"),
        (Mqt(keep=21), SITE, "must be in 1..20"),
        (Mqt(keep=4, heads=3), SITE, "must divide the width 8"),
        (Mqt(keep=4), Site(20, 2, None, SITE.signals, dim=8, llm_dim=12), "whole raster"),
    ],
)
def test_what_does_not_fit(method: Mqt, site: Site, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        method.fit(site)
