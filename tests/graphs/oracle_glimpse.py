"""GlimpsePrune's new modules as the publication has them: torch.nn modules with its names, and their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import graphs.glimpse


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(768, 768, bias=False), nn.Linear(768, 768, bias=False)
        self.v_proj, self.o_proj = nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor, cond: Tensor, angle: Tensor) -> Tensor:
        def turned(y: Tensor) -> Tensor:
            y = y.unflatten(-1, (4, 192))
            half = torch.cat([-y[..., 96:], y[..., :96]], -1)
            return (y * angle.cos()[:, None] + half * angle.sin()[:, None]).transpose(1, 2)

        both = torch.cat([x, cond], -1)
        v = self.v_proj(x).unflatten(-1, (4, 64)).transpose(1, 2)
        out = F.scaled_dot_product_attention(turned(self.q_proj(both)), turned(self.k_proj(both)), v)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(256, 512), nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(256, eps=1e-6), nn.RMSNorm(256, eps=1e-6)
        self.attn, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor, cond: Tensor, angle: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cond, angle)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Fuser(nn.Module):
    def __init__(self, heads: int, vision: int, blocks: int) -> None:
        super().__init__()
        self.attn_in_proj = nn.Linear(heads, 256)
        self.cond_in_projs = nn.ModuleList(nn.Linear(vision, 512) for _ in range(blocks))
        self.layers = nn.ModuleList(Layer() for _ in range(blocks))
        self.attn_out_projs = nn.ModuleList([*(nn.Identity() for _ in range(blocks - 1)), nn.Linear(256, 1)])

    def forward(self, attention: Tensor, grid: tuple[int, int], states: list[Tensor]) -> Tensor:
        """attention [batch, tokens, heads] and states, each [batch, tokens, vision] → logits [batch, tokens]."""
        rows, cols = grid
        inverse = 1.0 / (10000.0 ** (torch.arange(0, 96, 2).float() / 96))
        row, col = torch.meshgrid(torch.arange(rows).float(), torch.arange(cols).float(), indexing="ij")
        angle = torch.cat([row.reshape(-1, 1) * inverse, col.reshape(-1, 1) * inverse], 1)
        x = self.attn_in_proj(attention)
        for layer, project, state in zip(self.layers, self.cond_in_projs, states, strict=True):
            x = layer(x, project(state), torch.cat([angle, angle], 1))
        return self.attn_out_projs[-1](x).squeeze(-1)  # type: ignore[no-any-return]


class New(nn.Module):
    """What the publication adds to a model of `layers` decoder layers; norms of the decoder's `eps`."""

    def __init__(self, hidden: int, layers: int, heads: int, vision: int, blocks: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.learnable_embeddings = nn.Parameter(torch.empty(layers, 1, hidden))
        self.le_proj, self.le_norm = nn.Linear(hidden, hidden), nn.RMSNorm(hidden, eps=eps)
        self.attn_fuser = Fuser(heads, vision, blocks)

    def embedding(self, layer: int) -> Tensor:
        """[1, hidden]"""
        return self.le_norm(self.le_proj(self.learnable_embeddings[layer]))  # type: ignore[no-any-return]

    def randomized(self, seed: int = 0) -> New:
        """Weights large enough that everything matters."""
        draw = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            parameter.data = noise * scale * (2 if "proj" in name else 1) + ("norm" in name)
        return self.requires_grad_(False)

    def published(self) -> dict[str, Any]:
        """What its new_modules_gp.pt holds."""
        modules = {name: module.state_dict() for name, module in self.named_children()}
        return {"learnable_embeddings": self.learnable_embeddings.data, **modules}

    def save(self, file: Path) -> Path:
        """By the lines that `graphs.glimpse` tells its readers."""
        torch.save(self.published(), file.with_name("new_modules_gp.pt"))
        lines = [line.strip() for line in (graphs.glimpse.__doc__ or "").splitlines()]
        code = "\n".join(line for line in lines if line.startswith(("new =", "flat =", "save_file(")))
        assert code.count("\n") == 2, "three lines"
        for name in ("new_modules_gp.pt", "glimpse.safetensors"):
            code = code.replace(name, str(file.with_name(name) if name.endswith(".pt") else file))
        exec(code, {"torch": torch, "save_file": save_file})  # noqa: S102 - our own documentation
        return file
