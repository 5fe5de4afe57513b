"""Compressors: trained projectors that shorten, and the layers they are made of.

A compressor's tensors have the names and layouts of its published checkpoint, so that a file of its authors can be given as
it is. The functions here take `weights`, the signals of a `forward`, and the name of a layer in it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

from graphs._contract import OF_PROMPT, Reduction, ReductionError, Signals, Site, Tier, by_frame
from graphs._pool import bilinear, pool
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

C = TypeVar("C", bound="Compressor")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Compressor(Reduction):
    """A trained projector that shortens: tokens of the tower's width in, fewer of the language model's width out.

    It takes the place of the family's own projector, and the language model counts positions as if the tower had given
    what it returns. Reductions of the space "tower" may act before it, those of the space "llm" behind it.

    `weights`: safetensors file or checkpoint folder with its trained tensors. Without it they are in the model's own checkpoint,
    where that has its projector, or under the names that the method's authors publish.
    """

    place: ClassVar[str] = "projector"
    tier: ClassVar[Tier] = "trained"
    prefixes: ClassVar[tuple[str, ...]] = ("", "model.mm_projector.")

    weights: str | None = field(default=None, kw_only=True)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def merges(self) -> bool:
        return True

    def fit(self: C, site: Site) -> C:
        self.check()
        if not (site.dim and site.llm_dim):
            raise ReductionError("it needs the widths of tower and language model, which this model does not tell")
        fitted = self.fitted(site)
        fitted.require(site)
        fitted.after(site)
        return fitted

    def fitted(self: C, site: Site) -> C:
        """The knobs resolved for a site whose widths are known."""
        return self

    @abstractmethod
    def forward(self, signals: Signals, site: Site) -> Tensor:
        """[batch, frames, tokens, llm_dim], as many frames and tokens as `after` says.

        Args:
            signals: what `needs` names, with the frames axis, and the trained tensors. site: what it was fitted to.
        """


@dataclass(frozen=True)
class PerFrameCompressor(Compressor):
    """A `Compressor` that treats every frame alone. Subclasses write `compress` and say what shape comes out."""

    def fit(self: C, site: Site) -> C:
        fitted = Compressor.fit(self, site)
        shortens(site, fitted.after(site))
        return fitted

    @abstractmethod
    def shape(self, site: Site) -> tuple[int, int] | int:
        """Rows and columns of the tokens that a frame yields, or their number where there is no raster."""

    def after(self, site: Site) -> Site:
        return compressed(site, self.shape(site))

    def forward(self, signals: Signals, site: Site) -> Tensor:
        out: Tensor = self.compress(by_frame(signals, self.needs, site.frames), site).unflatten(0, (-1, site.frames))
        return out

    @abstractmethod
    def compress(self, signals: Signals, site: Site) -> Tensor:
        """[n, kept, llm_dim], of signals with leading axes [n, tokens], n being batch * frames."""


def compressed(site: Site, shape: tuple[int, int] | int, frames: int | None = None) -> Site:
    """The site behind a compressor: rows and columns, or tokens, of a frame."""
    grid = shape if isinstance(shape, tuple) else None
    tokens = shape[0] * shape[1] if isinstance(shape, tuple) else shape
    return replace(
        site,
        tokens=tokens,
        frames=site.frames if frames is None else frames,
        grid=grid,
        signals=site.signals & {"hidden", *OF_PROMPT},
        dim=site.llm_dim,
        patch_dim=0,
    )


def shortens(site: Site, after: Site) -> None:
    """Raises ReductionError where more tokens would leave than come."""
    if after.total > site.total:
        raise ReductionError(f"it shortens, and would yield {after.total} tokens where there are {site.total}")


def raster(site: Site) -> tuple[int, int]:
    """Rows and columns of a frame's tokens. Raises ReductionError where they lie in none."""
    if site.grid is None:
        raise ReductionError("it needs the whole raster of every frame: nothing may act before it")
    return site.grid


class Stretched:
    """Beside `Compressor`: the features are stretched to a raster of the model's own first, `grid`, rows and columns, bilinear."""

    grid: tuple[int, ...] | None

    def wanted(self, site: Site) -> tuple[int, ...]:
        """`grid`; by default 24 × 24 of the 27 × 27 that SigLIP gives at 384 pixels, and else what the tower gives."""
        return self.grid or ((24, 24) if raster(site) == (27, 27) else raster(site))

    @property
    def lengths(self) -> tuple[int, int]:
        """Rows and columns, once fitted."""
        assert self.grid is not None
        rows, columns = self.grid
        return rows, columns

    def stretched(self, x: Tensor, site: Site) -> Tensor:
        """x [..., tokens, dim] → [..., rows * columns, dim]."""
        return x if self.lengths == raster(site) else pool(bilinear(raster(site), self.lengths), x)


def divided(site: Site, side: int, knob: str) -> tuple[int, int]:
    """Rows and columns of the raster's cells of side × side, as `knob` says. Raises ReductionError where they do not fit."""
    rows, cols = raster(site)
    if side < 1 or rows % side or cols % side:
        raise ReductionError(f"`{knob}` must divide both sides of {rows} × {cols} tokens; found {side}")
    return rows // side, cols // side


def halved(site: Site) -> tuple[int, int]:
    """Rows and columns of the raster's 2 × 2 cells. Raises ReductionError where a side is odd."""
    rows, cols = raster(site)
    if rows % 2 or cols % 2:
        raise ReductionError(f"it takes cells of 2 × 2 tokens, so both sides must be even; found {rows} × {cols}")
    return rows // 2, cols // 2


def heads_of(heads: int | None, dim: int, head_dim: int) -> int:
    """Attention heads as given, or as many of `head_dim` as `dim` holds, at least one. Raises ReductionError."""
    found = max(1, dim // head_dim) if heads is None else heads
    if found < 1 or dim % found:
        raise ReductionError(f"`heads` must divide the width {dim} of what attends; found {found}")
    return found


# What layers hold


def linear_shapes(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm_shapes(name: str, dim: int, bias: bool = True) -> Shapes:
    return {f"{name}.{part}": (dim,) for part in (("weight", "bias") if bias else ("weight",))}


def conv_shapes(
    name: str, inputs: int, outputs: int, kernel: tuple[int, ...], *, groups: int = 1, bias: bool = True
) -> Shapes:
    return {f"{name}.weight": (outputs, inputs // groups, *kernel)} | ({f"{name}.bias": (outputs,)} if bias else {})


def multihead_shapes(name: str, dim: int) -> Shapes:
    """Of a torch.nn.MultiheadAttention."""
    return {
        f"{name}.in_proj_weight": (3 * dim, dim),
        f"{name}.in_proj_bias": (3 * dim,),
        **linear_shapes(f"{name}.out_proj", dim, dim),
    }


def stacked(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """The same names behind a prefix."""
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


# What they do


def linear(weights: Signals, name: str, x: Tensor) -> Tensor:
    """[..., in] → [..., out], the weight [out, in], or that of a convolution of single tokens [out, in, 1, …]."""
    x = x @ weights[f"{name}.weight"].flatten(1).t()
    return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x


def layer_norm(weights: Signals, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Over the last axis, in float32."""
    weight, bias = weights[f"{name}.weight"].float(), weights.get(f"{name}.bias")
    bias = None if bias is None else bias.float()
    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def rms_norm(weights: Signals, name: str, x: Tensor, eps: float) -> Tensor:
    """Over the last axis, in float32, without bias."""
    wide = x.float()
    wide = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weights[f"{name}.weight"]


def mlp(weights: Signals, first: str, second: str, x: Tensor) -> Tensor:
    """Linear, GELU, Linear: the projector that most models have."""
    return linear(weights, second, torch.nn.functional.gelu(linear(weights, first, x)))


def to_planes(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[n, tokens, dim] → [n, dim, rows, cols]"""
    planes: Tensor = x.transpose(1, 2).unflatten(2, grid)
    return planes


def to_tokens(planes: Tensor) -> Tensor:
    """[n, dim, rows, cols] → [n, tokens, dim]"""
    return planes.flatten(2).transpose(1, 2)


def conv(
    weights: Signals,
    name: str,
    planes: Tensor,
    *,
    stride: int | tuple[int, int, int] = 1,
    padding: int = 0,
    groups: int = 1,
) -> Tensor:
    """A convolution of [n, dim, rows, cols], or of clips [n, dim, frames, rows, cols]."""
    f = torch.nn.functional.conv2d if planes.ndim == 4 else torch.nn.functional.conv3d
    out: Tensor = f(planes, weights[f"{name}.weight"], weights.get(f"{name}.bias"), stride, padding, 1, groups)
    return out


def to_clip(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[n, frames, tokens, dim] → [n, dim, frames, rows, cols]"""
    clip: Tensor = x.permute(0, 3, 1, 2).unflatten(3, grid)
    return clip


def from_clip(clip: Tensor) -> Tensor:
    """[n, dim, frames, rows, cols] → [n, frames, tokens, dim]"""
    return clip.flatten(3).permute(0, 2, 3, 1)


def cells(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """[n, tokens, dim] → [n, cells, side * side, dim]: square cells of the raster, the tokens of each in raster order."""
    rows, cols = grid
    apart = x.unflatten(1, (rows // side, side, cols // side, side)).transpose(2, 3)
    found: Tensor = apart.flatten(3, 4).flatten(1, 2)
    return found


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention of projected q [n, queries, dim], k and v [n, tokens, dim], softmax in float32 → [n, queries, dim].

    Args:
        mask: float32, added to the scores [n, heads, queries, tokens].
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float()
    if mask is not None:
        scores = scores + mask
    out: Tensor = (torch.softmax(scores, -1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
    return out


def multihead(weights: Signals, name: str, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """torch.nn.MultiheadAttention of q [n, queries, dim], k and v [n, tokens, dim] → [n, queries, dim]. Where n is 1 the
    tensor counts for all, so that attention that does not see the image is made of weights alone, which runtimes fold."""
    parts = zip(
        (q, k, v), weights[f"{name}.in_proj_weight"].chunk(3), weights[f"{name}.in_proj_bias"].chunk(3), strict=True
    )
    q, k, v = (x @ weight.t() + bias for x, weight, bias in parts)
    return linear(weights, f"{name}.out_proj", attention(q, k, v, heads))


def squeeze_excite(
    weights: Signals, name: str, x: Tensor, activation: Callable[[Tensor], Tensor], gate: Callable[[Tensor], Tensor]
) -> Tensor:
    """x [n, tokens, dim], each channel times a gate that two layers, `fc1` and `fc2`, open by the means of all."""
    squeezed = activation(linear(weights, f"{name}.fc1", x.mean(1, keepdim=True)))
    return x * gate(linear(weights, f"{name}.fc2", squeezed))


def regnet_shapes(name: str, inputs: int, outputs: int, depth: int) -> Shapes:
    """A stage of `depth` RegNet blocks, as timm names them: depthwise, norms over the channels, squeeze to a quarter."""
    made: Shapes = {}
    for number in range(1, depth + 1):
        block, squeezed = f"{name}.b{number}", round(inputs / 4)
        layers = {"conv1": (inputs, 1), "conv2": (1, 3), "conv3": (outputs, 1)}
        if inputs != outputs:
            layers["downsample"] = (inputs, 1)
        for layer, (each, side) in layers.items():
            made[f"{block}.{layer}.conv.weight"] = (outputs, each, side, side)
            made |= norm_shapes(f"{block}.{layer}.bn", outputs)
        made |= conv_shapes(f"{block}.se.fc1", outputs, squeezed, (1, 1))
        made |= conv_shapes(f"{block}.se.fc2", squeezed, outputs, (1, 1))
        inputs = outputs
    return made


def regnet(weights: Signals, name: str, depth: int, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """That stage: [n, tokens, inputs] → [n, tokens, outputs]."""
    silu = torch.nn.functional.silu
    for number in range(1, depth + 1):
        block = f"{name}.b{number}"
        shortcut = x
        x = silu(_pointwise(weights, f"{block}.conv1", x))
        planes = conv(weights, f"{block}.conv2.conv", to_planes(x, grid), padding=1, groups=x.shape[-1])
        x = silu(layer_norm(weights, f"{block}.conv2.bn", to_tokens(planes)))
        x = squeeze_excite(weights, f"{block}.se", x, silu, torch.sigmoid)
        if f"{block}.downsample.conv.weight" in weights:
            shortcut = _pointwise(weights, f"{block}.downsample", shortcut)
        x = silu(_pointwise(weights, f"{block}.conv3", x) + shortcut)
    return x


def _pointwise(weights: Signals, name: str, x: Tensor) -> Tensor:
    return layer_norm(weights, f"{name}.bn", linear(weights, f"{name}.conv", x))
