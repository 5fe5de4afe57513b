"""Keys and values in the cache: as they are, or as INT8 with a scale per token and head.

What a token leaves in a head, one vector, is rounded to whole multiples of its own largest magnitude / 127, in the graph, when it enters
the cache. Nothing is calibrated, and a token's integers never change again. Attention reads the past from the integers and the new
tokens as they are, so that a prompt run whole sees what it would see without. `Cast` and `Mul`, as TensorRT's `DequantizeLinear` takes
scales that are constant only.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from exporter.kv import KvLayout
from exporter.nn.atom import Atom

LARGEST = 127
"""Of the integers; -128 is not used."""
SMALLEST = 2.0**-14
"""Of a scale: the smallest normal float16."""


class Dequantize(Atom):
    """int8 [batch, kv_heads, past, head_dim] and their scale [batch, kv_heads, past, 1] → the scale's type."""

    def key(self) -> Hashable:
        return None

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x.to(scale.dtype) * scale


class Quantize(Atom):
    """Keys or values [batch, kv_heads, total, head_dim] of which the first ones are in the cache, `past` int8 [batch, kv_heads, past,
    head_dim] → int8 of all, and the scale of the new ones [batch, kv_heads, total - past, 1]."""

    def key(self) -> Hashable:
        return None

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        new = (x if past is None else x[:, :, past.shape[2] :]).float()
        scale = (new.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(SMALLEST).to(x.dtype)
        found = torch.round(new / scale.float()).clamp(-LARGEST, LARGEST).to(torch.int8)
        return found if past is None else torch.cat([past, found], 2), scale


class Apart(Atom):
    """The scales of a KV group [batch, count * kv_heads, past, 1] → each [batch, kv_heads, past, 1]."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def key(self) -> Hashable:
        return self.count

    def forward(self, scales: Tensor) -> tuple[Tensor, ...]:
        return scales.chunk(self.count, 1)


class Together(Atom):
    """The new tokens' scales of a KV group, each [batch, kv_heads, seq, 1], behind those of the past [batch, count * kv_heads, past, 1]."""

    def key(self) -> Hashable:
        return None

    def forward(self, past: Tensor | None, *scales: Tensor) -> Tensor:
        new = torch.cat(scales, 1)
        return new if past is None else torch.cat([past, new], 2)


class Int8(nn.Module):
    """The atoms of an INT8 cache. The scales of a KV group are one tensor [batch, rows, tokens, 1]: those of its first layer's keys,
    head by head, then of its values, then of the next layer."""

    def __init__(self, layout: KvLayout) -> None:
        super().__init__()
        self.counts = [2 * layout.groups.count(group) for group in range(len(layout.kept))]
        self.apart = nn.ModuleList(map(Apart, self.counts))
        self.dequantize, self.quantize, self.together = Dequantize(), Quantize(), Together()


class Cache:
    """What a run of the language model finds in the cache and leaves there, layer by layer: keys and values as they are.

    Args:
        keys, values: per layer [batch, kv_heads, past, head_dim]; empty: there is no past.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.keys, self.values = keys, values
        self.kept: list[list[Tensor]] = [[]]
        """What was left: key and value of every layer so far, alternating."""

    def past(self, layer: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        return (self.keys[layer], self.values[layer]) if self.keys else (None, None)

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value: [batch, kv_heads, past + new, head_dim]."""
        self.kept[0] += [key, value]

    def present(self) -> list[Tensor]:
        """All that was left: key and value of every layer."""
        return self.kept[0]


class Int8Cache(Cache):
    """The same as integers: floats are made of a layer's past when it runs, and gone behind it.

    Args:
        keys, values: int8. scales: per KV group, as `Int8` says.
    """

    def __init__(self, atoms: Int8, keys: Sequence[Tensor], values: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
        super().__init__(keys, values)
        self.atoms, self.scales = atoms, scales
        self.rows = [row for apart, group in zip(atoms.apart, scales, strict=False) for row in apart(group)]
        self.kept.append([])  # scales

    def past(self, layer: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        key, value = super().past(layer)
        if key is None:
            return None, None
        make, rows = self.atoms.dequantize, self.rows[2 * layer : 2 * layer + 2]
        return make(key, rows[0]), make(value, rows[1])

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        for x, past in zip((key, value), super().past(layer), strict=True):
            for kept, made in zip(self.kept, self.atoms.quantize(x, past), strict=True):
                kept.append(made)

    def present(self) -> list[Tensor]:
        """Then the scales of every KV group."""
        integers, new = self.kept[0], iter(self.kept[1])
        pasts: Sequence[Tensor | None] = self.scales or [None] * len(self.atoms.counts)
        groups = zip(pasts, self.atoms.counts, strict=True)
        return [*integers, *(self.atoms.together(past, *(next(new) for _ in range(n))) for past, n in groups)]


def opened(int8: Int8 | None, keys: Sequence[Tensor], values: Sequence[Tensor], scales: Sequence[Tensor]) -> Cache:
    return Cache(keys, values) if int8 is None else Int8Cache(int8, keys, values, scales)
