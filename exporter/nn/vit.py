"""CLIP, SigLIP and InternViT vision towers (what differs is in `VitSpec`), with taps for the signals a reduction needs and a
site for in-tower reductions."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from exporter.nn.atom import Atom
from exporter.nn.layers import LayerNorm, Linear, Mlp, RMSNorm, attend, attention_map, merge_heads, split_heads
from exporter.nn.specs import BlockSpec, FastVitSpec, PixtralSpec, VitSpec
from graphs._blocks import take
from graphs._contract import InTower
from graphs._pool import bilinear, pool

TapSpec = VitSpec | PixtralSpec | FastVitSpec


class Embeddings(Atom):
    """Patches, class token and learned positions. [batch, frames, 3, height, width] → [batch * frames, tokens, hidden]"""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, spec.hidden, spec.patch, spec.patch, bias=spec.patch_bias)
        self.patch_embedding.requires_grad_(False)
        if spec.cls:
            self.class_embedding = nn.Parameter(torch.empty(spec.hidden), requires_grad=False)
        self.position_embedding = Table(spec.side**2 + spec.cls, spec.hidden)
        self.spec = spec

    def key(self) -> Hashable:
        return self.spec

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values.flatten(0, 1)).flatten(2).transpose(1, 2)
        if self.spec.cls:
            x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1)
        return x + self.position_embedding.weight


class Table(nn.Module):
    """A learned table that is added whole; keeps the parameter name of torch.nn.Embedding."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim), requires_grad=False)


class SelfAttention(nn.Module):
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        for name in "qkv":
            self.add_module(f"{name}_proj", Linear(spec.hidden, spec.hidden, spec.qkv_bias))
        self.out_proj = Linear(spec.hidden, spec.hidden)
        if spec.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(spec.hidden, 1e-6) for _ in "qk")
        self.spec = spec

    def project(self, x: Tensor, names: str) -> list[Tensor]:
        """Those of q, k, v that are named, each [batch, heads, tokens, head_dim]."""
        return [split_heads(self._projected(x, n), self.spec.heads) for n in names]

    def _projected(self, x: Tensor, name: str) -> Tensor:
        x = self.get_submodule(f"{name}_proj")(x)
        return self.get_submodule(f"{name}_norm")(x) if self.spec.qk_norm and name != "v" else x

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the output and the q, k, v that made it."""
        q, k, v = self.project(x, "qkv")
        return self.out_proj(merge_heads(attend(q, k, v, bias))), q, k, v


class Block(Atom):
    """One tower block: x [n, tokens, hidden] → x, and the q, k of its attention."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        norm = RMSNorm if spec.rms_norm else LayerNorm
        self.layer_norm1 = norm(spec.hidden, spec.eps)
        self.self_attn = SelfAttention(spec)
        self.layer_norm2 = norm(spec.hidden, spec.eps)
        self.mlp = Mlp(spec.hidden, spec.intermediate, spec.activation)
        if spec.layer_scale:
            self.lambda_1, self.lambda_2 = (
                nn.Parameter(torch.empty(spec.hidden), requires_grad=False) for _ in range(2)
            )
        self.spec = spec

    def key(self) -> Hashable:
        return self.spec

    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, ...]:
        """size float32 [batch, frames, tokens]: attention is proportional to it."""
        out, q, k, _ = self.self_attn(self.layer_norm1(x), _proportional(size, x))
        return self.through_mlp(self.behind_attention(x, out)), q, k

    def behind_attention(self, x: Tensor, out: Tensor) -> Tensor:
        return x + (out * self.lambda_1 if self.spec.layer_scale else out)

    def through_mlp(self, x: Tensor) -> Tensor:
        out = self.mlp(self.layer_norm2(x))
        return x + (out * self.lambda_2 if self.spec.layer_scale else out)


class Probe(Block):
    """The q, k of a block behind the features, without the rest of it."""

    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, ...]:
        q, k = self.self_attn.project(self.layer_norm1(x), "qk")
        return q, k


def _proportional(size: Tensor | None, x: Tensor) -> Tensor | None:
    """The bias on attention logits that lets a token count `size` times: [n, 1, 1, tokens]."""
    return None if size is None else torch.log(size).flatten(0, 1)[:, None, None, :].to(x.dtype)


class ReducingBlock(Block):
    """A block with an in-tower reduction between attention and MLP.

    x [batch * frames, tokens, hidden], size and anchor [batch, frames, tokens] (None before the first) → the same.
    `anchor`: each token's place among the patches of all frames, -1 for CLS.
    """

    spec: VitSpec

    def __init__(self, spec: VitSpec, index: int, name: str, method: InTower, frames: int) -> None:
        super().__init__(spec)
        self.index, self.name, self.method, self.frames = index, name, method, frames
        self.add_module(name, _Reduce(method))

    def key(self) -> Hashable:
        return self.spec, self.index, self.name, self.method, self.frames

    def forward(self, x: Tensor, size: Tensor | None = None, anchor: Tensor | None = None) -> tuple[Tensor, ...]:
        bias = _proportional(size, x) if self.method.proportional else None
        out, q, k, v = self.self_attn(self.layer_norm1(x), bias)
        x = self.behind_attention(x, out)
        if size is None or anchor is None:
            size, anchor = self.first(x)
        frames, cls = size.shape[1], int(self.spec.cls)
        needs = self.method.needs
        signals = {n: f(q, k, v, bias).unflatten(0, (-1, frames)) for n, f in IN_TOWER.items() if n in needs}
        signals |= {"hidden": x.unflatten(0, (-1, frames)), "size": size}
        tokens, index, size = self.get_submodule(self.name)(self.index, signals, cls)
        anchor = take(anchor.flatten(1), index.flatten(1)).unflatten(1, index.shape[1:])
        return self.through_mlp(tokens.flatten(0, 1)), size, anchor

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Size and anchor where nothing has been reduced yet."""
        size = torch.ones_like(x[..., 0], dtype=torch.float32).unflatten(0, (-1, self.frames))
        cls = int(self.spec.cls)
        patches = x.shape[1] - cls
        place = torch.arange(-cls, patches)
        place = torch.where(place >= 0, place + patches * torch.arange(self.frames)[:, None], -1)
        return size, size.to(torch.int64) * place


class _Reduce(nn.Module):
    """Gives the reduction's nodes its name in the graph."""

    def __init__(self, method: InTower) -> None:
        super().__init__()
        self.method = method

    def forward(self, block: int, signals: dict[str, Tensor], cls_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        out = self.method.forward(block, signals, cls_tokens)
        assert out.size is not None
        return out.tokens, out.index, out.size


IN_TOWER: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "keys": lambda q, k, v, bias: k.mean(1),
    "attention": lambda q, k, v, bias: attention_map(q, k, bias),
    "cls_attention": lambda q, k, v, bias: attention_map(q[:, :, :1], k, bias)[:, 0],
    "column_attention": lambda q, k, v, bias: attention_map(q, k, bias).mean(1),
    "value_norm": lambda q, k, v, bias: merge_heads(v).float().pow(2).sum(-1).sqrt(),
}
"""Signals inside the tower, beside hidden and size, from a block's q, k, v and the bias of its attention."""


class TowerNorm(Atom, LayerNorm):
    """CLIP's norm before the first block, SigLIP's behind the last."""

    def key(self) -> Hashable:
        return self.eps


class Tap(Atom):
    """A signal from the q, k of one block, or from a block's output; unfolds [batch * frames, ...] to [batch, frames, ...].

    Where a token is several patches, `hidden` holds them side by side, row by row, and all else is their mean.
    """

    def __init__(self, spec: TapSpec, kind: str, frames: int) -> None:
        super().__init__()
        self.spec, self.kind, self.cls, self.frames = spec, kind, int(spec.cls), frames

    def key(self) -> Hashable:
        return self.spec, self.kind, self.frames

    def forward(self, *values: Tensor) -> Tensor:
        """Of a block's output: x, and the tokens' sizes [batch, frames, tokens] if frames may have merged."""
        frames = values[1].shape[1] if self.kind in FROM_OUTPUT and len(values) > 1 else self.frames
        out: Tensor = getattr(self, FROM_OUTPUT.get(self.kind, self.kind))(*values)
        return out if self.kind == "anchor" else out.unflatten(0, (-1, frames))

    def patches(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        x = x[:, self.cls :]
        return self.per_token(x) if self.spec.merge == 1 or self.spec.pooled else self.by_token(x).flatten(2)

    def by_token(self, x: Tensor) -> Tensor:
        """[n, patches, …] → [n, tokens, patches of a token, …]"""
        (rows, cols), merge = self.spec.grid, self.spec.merge
        x = x.unflatten(1, (rows, merge, cols, merge)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    def per_token(self, x: Tensor) -> Tensor:
        """[n, patches, …] → [n, tokens, …], the mean over the patches of a token."""
        return x if self.spec.merge == 1 else self.by_token(x).mean(2)

    def cls_token(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        return x[:, 0]

    def anchor(self, anchor: Tensor) -> Tensor:
        return anchor[:, :, self.cls :]

    def keys(self, q: Tensor, k: Tensor) -> Tensor:
        return self.per_token(k.mean(1)[:, self.cls :])

    def cls_keys(self, q: Tensor, k: Tensor) -> Tensor:
        return k.mean(1)[:, 0]

    def joint_keys(self, q: Tensor, k: Tensor) -> Tensor:
        return self.per_token(merge_heads(k)[:, self.cls :])

    def cls_attention(self, q: Tensor, k: Tensor) -> Tensor:
        return self.per_token(attention_map(q[:, :, :1], k)[:, 0, 1:])

    def joint_cls_attention(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = merge_heads(q)[:, None, :1], merge_heads(k)[:, None]
        return self.per_token(attention_map(q, k)[:, 0, 1:])

    def column_attention(self, q: Tensor, k: Tensor) -> Tensor:
        return self.per_token(attention_map(q, k).mean(1)[:, self.cls :])


class Aligned(Tap):
    """The patches [batch, frames, tokens, shared] in the space that a CLIP tower shares with its text: what CLIP does
    to its class token at the end of the tower, done to the patches. The parameters are the CLIP checkpoint's."""

    def __init__(self, spec: VitSpec, shared: int, frames: int) -> None:
        super().__init__(spec, "aligned", frames)
        self.post_layernorm = LayerNorm(spec.hidden, spec.eps)
        self.visual_projection = Linear(spec.hidden, shared, bias=False)
        self.shape = spec.hidden, shared, spec.eps

    def key(self) -> Hashable:
        return super().key(), self.shape

    def aligned(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        return self.visual_projection(self.post_layernorm(self.patches(x)))


FROM_OUTPUT = {"hidden": "patches", "patches": "patches", "cls": "cls_token", "aligned": "aligned"}
"""Signals read from a block's output, and the tap's method for each."""


class Vit(nn.Module):
    """The tower up to its feature block, and as far behind it as a signal asks.

    Args:
        taps: signals to output, e.g. ("hidden", "cls_attention", "keys@7"); see `graphs._contract`.
        frames: frames of a sample.
        in_tower: (name, fitted method) or None.
        shared: width of `aligned`, if that is among the taps.
    """

    def __init__(
        self,
        spec: VitSpec,
        taps: tuple[str, ...],
        frames: int,
        in_tower: tuple[str, InTower] | None = None,
        shared: int = 0,
    ) -> None:
        super().__init__()
        self.spec, self.taps = spec, taps
        self.embeddings = Embeddings(spec)
        if spec.pre_norm:
            self.pre_layrnorm = TowerNorm(spec.hidden, spec.eps)
        if spec.post_norm:
            self.post_layernorm = TowerNorm(spec.hidden, spec.eps)
        self.reduces = in_tower[1].blocks if in_tower else ()
        self.proportional = bool(in_tower and in_tower[1].proportional)
        named = [parts(name, spec) for name in taps]
        count = max(spec.blocks, *(block + 1 for _, block in named))
        last_is_read = any(kind in FROM_OUTPUT and block == count - 1 for kind, block in named)
        blocks: list[Block] = []
        for i in range(count):
            if in_tower and i in self.reduces:
                blocks.append(ReducingBlock(spec, i, *in_tower, frames))
            else:
                blocks.append(Block(spec) if i < spec.blocks or i < count - 1 or last_is_read else Probe(spec))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        for name, (kind, _) in zip(taps, named, strict=True):
            tap = Aligned(spec, shared, frames) if kind == "aligned" else Tap(spec, kind, frames)
            self.add_module(f"tap_{name}", tap)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """pixel_values [batch, frames, 3, height, width] → the taps in order, leading axes [batch, frames]."""
        x = self.embeddings(pixel_values)
        if self.spec.pre_norm:
            x = self.pre_layrnorm(x)
        found: dict[str, Tensor] = {}
        size = anchor = None
        layers = self.encoder["layers"]
        assert isinstance(layers, nn.ModuleList)
        for i, block in enumerate(layers):
            if i in self.reduces:
                x, size, anchor = block(x, size, anchor)
                qk: tuple[Tensor, ...] = ()
            elif isinstance(block, Probe):
                qk = block(x)
            else:
                x, *rest = block(x, size if self.proportional else None)
                qk = tuple(rest)
            out = self.post_layernorm(x) if self.spec.post_norm and i == self.spec.blocks - 1 else x
            for name in self.taps:
                kind, at = parts(name, self.spec)
                if i == at and kind != "anchor":
                    values = qk if kind not in FROM_OUTPUT else (out,) if size is None else (out, size)
                    found[name] = self.get_submodule(f"tap_{name}")(*values)
        if anchor is not None:
            found["anchor"] = self.get_submodule("tap_anchor")(anchor)
        return [found[name] for name in self.taps]


class HalvedVit(Vit):
    """A tower whose raster is halved bilinearly, rows and columns rounded up, behind the projector; the signals follow."""

    def __init__(self, spec: VitSpec, taps: tuple[str, ...], frames: int, projector: nn.Module | None) -> None:
        super().__init__(spec, taps, frames)
        self.projector = projector
        for name in taps:
            self.add_module(f"halved_{name}", Halved(spec.grid, projector if name == "hidden" else None))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """As that of `Vit`."""
        found = super().forward(pixel_values)
        return [self.get_submodule(f"halved_{name}")(x) for name, x in zip(self.taps, found, strict=True)]


class Halved(Atom):
    """[batch, frames, tokens, …] → projected, if there is a projector, and resized to half of the raster."""

    def __init__(self, grid: tuple[int, int], projector: nn.Module | None) -> None:
        super().__init__()
        self.grid, self.projector = grid, projector

    def key(self) -> Hashable:
        shapes = () if self.projector is None else tuple(tuple(p.shape) for p in self.projector.parameters())
        return self.grid, shapes

    def forward(self, x: Tensor) -> Tensor:
        matrix = bilinear(self.grid, (-(-self.grid[0] // 2), -(-self.grid[1] // 2)))
        if x.ndim == 3:
            return pool(matrix, x[..., None])[..., 0]
        return pool(matrix, x if self.projector is None else self.projector(x))


class NamedTower(nn.Module):
    """A tower under a name of its own, where a checkpoint has several."""

    def __init__(self, name: str, tower: nn.Module) -> None:
        super().__init__()
        self.add_module(name, tower)
        self.name = name

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        found: list[Tensor] = self.get_submodule(self.name)(pixel_values)
        return found


def parts(name: str, spec: TapSpec) -> tuple[str, int]:
    """A signal's kind and block: "keys@7" → keys, 7; without a block that of the features."""
    kind, _, at = name.partition("@")
    return kind, int(at) if at else spec.blocks - 1
