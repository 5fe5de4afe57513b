from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.errors import UsageError
from graphs._contract import ReductionError, Site
from graphs.sva import Sva
from tests.families import tiny
from tests.graphs.compressing import close, normal, weights_of

DIM, WIDE, LLM = 8, 32, 12
SITE = Site(24, 2, (4, 6), frozenset({"hidden"}), dim=DIM, llm_dim=LLM)


def published(towers: int) -> dict[str, tuple[int, ...]]:
    """What the official code has for LongVU-Qwen2-7B, whose towers are SigLIP (1152) and DINOv2-giant (1536)."""
    found: dict[str, tuple[int, ...]] = {
        "model.vision_query": (1, 1024),
        "model.image_newline": (3584,),
        "model.mm_projector.0.weight": (3584, 1024),
        "model.mm_projector.0.bias": (3584,),
        "model.mm_projector.2.weight": (3584, 3584),
        "model.mm_projector.2.bias": (3584,),
    }
    for n, dim in enumerate((1152, 1536)[:towers]):
        aux = f"model.mm_projector_aux_{n}"
        found |= {f"{aux}.0.weight": (1024, dim), f"{aux}.0.bias": (1024,)}
        found |= {f"{aux}.2.weight": (1024, 1024), f"{aux}.2.bias": (1024,)}
        found |= {f"{aux}.3.weight": (1024,), f"{aux}.3.bias": (1024,)}
    for n in range(3):
        layer = f"model.vision_sampler_0.layers.{n}"
        found |= {
            f"{layer}.proj_context.weight": (1024, 1024),
            f"{layer}.proj_in.weight": (1024, 2048),
            f"{layer}.proj_out.linear_1.weight": (1024, 1024),
            f"{layer}.proj_out.linear_2.weight": (1024, 1024),
            f"{layer}.norm.weight": (1024,),
            f"{layer}.norm.bias": (1024,),
            f"{layer}.cross_attn.o_proj.weight": (1024, 1024),
        }
        for part in ("q_proj", *(f"{x}_proj_{tower}" for x in "kv" for tower in range(towers))):
            found |= {f"{layer}.cross_attn.{part}.0.{leaf}": (1024,) for leaf in ("weight", "bias")}
            found[f"{layer}.cross_attn.{part}.1.weight"] = (1024, 1024)
        found |= {f"{layer}.pos_embed_{tower}": (4, 1024) for tower in range(towers)}
    return found


SIGLIP = Site(729, 1, (27, 27), frozenset({"hidden"}), dim=1152, llm_dim=3584)


def test_tensors_are_those_of_the_official_code() -> None:
    method = Sva().fit(SIGLIP)
    assert {Sva.prefixes[1] + name: shape for name, shape in method.trained(SIGLIP).items()} == published(1)
    assert method.after(SIGLIP).tokens == 12 * 13
    assert Sva(row_ends=False).fit(SIGLIP).after(SIGLIP).grid == (12, 12)


def test_checkpoints_of_other_models_are_refused_in_words() -> None:
    method = Sva().fit(SIGLIP)
    one, two = ({name.removeprefix("model.") for name in published(n)} for n in (1, 2))
    assert method.strange(one) is None
    assert "joins the tokens of 2 vision towers" in str(method.strange(two))
    assert "aggregators inside the language model" in str(method.strange(one | {"vision_sampler_layers.0.x"}))
    assert "depth=3" in str(Sva(depth=1).fit(SIGLIP).strange(one))


def test_a_plan_says_so(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "model")
    save_file({f"model.mm_projector_aux_{n}.0.weight": torch.zeros(4, 4) for n in range(2)}, tmp_path / "w.safetensors")
    with pytest.raises(
        UsageError, match=r"w\.safetensors does not fit this method: its aggregator joins the tokens of 2"
    ):
        tiny.plan(tmp_path / "model", (f"sva:weights={tmp_path / 'w.safetensors'}",))


class Attend(nn.Module):
    """The official cross attention with PyTorch's own fused one."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj_0", "v_proj_0"):
            self.add_module(name, nn.Sequential(nn.LayerNorm(WIDE), nn.Linear(WIDE, WIDE, bias=False)))
        self.o_proj = nn.Linear(WIDE, WIDE, bias=False)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """query [1, dim] and tokens [tokens, dim] of one cell."""
        q = self.get_submodule("q_proj")(query).view(-1, 16, 2).transpose(0, 1)
        k, v = (self.get_submodule(f"{x}_proj_0")(tokens).view(-1, 16, 2).transpose(0, 1) for x in "kv")
        out: Tensor = self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(1, WIDE))
        return out


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = (nn.Linear(WIDE, WIDE, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.gelu(self.linear_1(x)))
        return out


class Layer(nn.Module):
    def __init__(self, side: int) -> None:
        super().__init__()
        self.proj_context, self.proj_in = nn.Linear(WIDE, WIDE, bias=False), nn.Linear(2 * WIDE, WIDE, bias=False)
        self.norm, self.cross_attn, self.proj_out = nn.LayerNorm(WIDE), Attend(), Mlp()
        if side > 1:
            self.pos_embed_0 = nn.Parameter(torch.empty(side**2, WIDE))

    def forward(self, query: Tensor, context: Tensor, tokens: Tensor) -> Tensor:
        q = self.proj_in(torch.cat([query, self.proj_context(context)], -1))
        placed = tokens + self.pos_embed_0 if len(tokens) > 1 else tokens
        out: Tensor = query + self.proj_out(self.norm(q + self.cross_attn(q, placed)))
        return out


class Sampler(nn.Module):
    def __init__(self, depth: int, side: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(side) for _ in range(depth))


class Model(nn.Module):
    """The publication's, frame by frame and query by query."""

    def __init__(self, depth: int, side: int, row_ends: bool) -> None:
        super().__init__()
        self.side = side
        self.vision_query = nn.Parameter(torch.empty(1, WIDE))
        self.mm_projector_aux_0 = nn.Sequential(
            nn.Linear(DIM, WIDE), nn.GELU(), nn.Linear(WIDE, WIDE), nn.LayerNorm(WIDE)
        )
        self.vision_sampler_0 = Sampler(depth, side)
        self.mm_projector = nn.Sequential(nn.Linear(WIDE, LLM), nn.GELU(), nn.Linear(LLM, LLM))
        self.image_newline = nn.Parameter(torch.empty(LLM)) if row_ends else None

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[rows, cols, dim] of one frame → [tokens, llm]"""
        x = F.interpolate(x.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        x = self.mm_projector_aux_0(x)
        context, out = x.mean((0, 1))[None], []
        for r in range(0, size[0], self.side):
            for c in range(0, size[1], self.side):
                query = self.vision_query
                for layer in self.vision_sampler_0.layers:
                    query = layer(query, context, x[r : r + self.side, c : c + self.side].reshape(-1, WIDE))
                out.append(self.mm_projector(query)[0])
            if self.image_newline is not None:
                out.append(self.image_newline)
        return torch.stack(out)


@pytest.mark.parametrize(
    ("side", "depth", "grid", "row_ends"), [(2, 3, None, True), (1, 1, None, False), (3, 2, (6, 9), True)]
)
def test_against_modules_of_the_official_model(
    side: int, depth: int, grid: tuple[int, int] | None, row_ends: bool
) -> None:
    method = Sva(side, grid, depth, WIDE, row_ends).fit(SITE)
    x, named = normal(2, 2, 24, DIM), weights_of(method, SITE)
    model = Model(depth, side, row_ends)
    model.load_state_dict(named)
    with torch.no_grad():
        frames = [model(frame.unflatten(0, (4, 6)), grid or (4, 6)) for frame in x.flatten(0, 1)]
    close(method.forward({"hidden": x} | named, SITE), torch.stack(frames).unflatten(0, (2, 2)))


def test_what_does_not_fit() -> None:
    with pytest.raises(ReductionError, match=r"which `side` must divide; found 4\+6 and 4"):
        Sva(4).fit(SITE)
    with pytest.raises(ReductionError, match="`width` a multiple of its 16 heads; found 3 and 40"):
        Sva(width=40).fit(SITE)
    with pytest.raises(ReductionError, match="whole raster"):
        Sva().fit(dataclasses.replace(SITE, grid=None))
    with pytest.raises(ReductionError, match="it shortens, and would yield 28 tokens"):
        Sva(1).fit(dataclasses.replace(SITE, frames=1))
