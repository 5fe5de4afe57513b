"""How a published checkpoint holds quantised matrices, and what all layouts have in common: integers packed into words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.quantize._contract import Quantized


@dataclass(frozen=True)
class Parts:
    """The tensors of one matrix, by the names that they have behind its own: `parts("qweight")`, `"g_idx" in parts`."""

    name: str
    bytes: Mapping[str, int]
    tensor: Callable[[str], Tensor]

    def __call__(self, suffix: str) -> Tensor:
        if suffix not in self.bytes:
            raise CheckpointError(
                f"`{self.name}` has no tensor `{suffix}` beside {', '.join(sorted(self.bytes))}. The checkpoint is incomplete."
            )
        return self.tensor(suffix)

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.bytes


class Packing(ABC):
    """One layout. Importing its module imports no torch."""

    marker: ClassVar[tuple[str, ...]]
    """A matrix is in this layout where any of these tensors is there."""

    @abstractmethod
    def bits(self, config: Mapping[str, Any]) -> int:
        """Bits of an integer; 0 where they are floats. Raises CheckpointError for a variant that is not read."""

    @abstractmethod
    def quantized(self, config: Mapping[str, Any], parts: Parts) -> Quantized:
        """The matrix [in, out] without loss; only asked for where it is INT4."""

    def read(self, config: Mapping[str, Any], parts: Parts) -> Tensor:
        """The matrix as float32 [in, out]."""
        return self.quantized(config, parts).dequantized()


@dataclass(frozen=True)
class Matrix:
    """One matrix of a quantised checkpoint."""

    packing: Packing
    config: Mapping[str, Any]
    parts: Parts

    @cached_property
    def int4(self) -> bool:
        return self.packing.bits(self.config) == 4

    def quantized(self) -> Quantized:
        return self.packing.quantized(self.config, self.parts)

    def read(self) -> Tensor:
        return self.packing.read(self.config, self.parts)

    @property
    def bytes(self) -> int:
        return sum(self.parts.bytes.values())


def unpacked(words: Tensor, axis: int, bits: int = 4) -> Tensor:
    """int32 words → int8 values 0..2^bits - 1, the first of a word in its lowest bits; `axis` grows by 32 / bits."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shape = [1] * (words.ndim + 1)
    shape[axis + 1] = len(shifts)
    values = (words.unsqueeze(axis + 1) >> shifts.view(shape)) & (2**bits - 1)
    found: Tensor = values.flatten(axis, axis + 1).to(torch.uint8 if bits == 8 else torch.int8)
    return found


def assembled(q: Tensor, zero: Tensor | None, scale: Tensor, group: Tensor | None = None) -> Quantized:
    """scale * (q - zero) as symmetric INT4 and what is left of the zero points.

    Args:
        q: int8 [in, out] in -8..7. zero: [groups, out], in steps; None: there is none. scale: [groups, out].
        group: int [in], the group of every row, where they do not stand in order.
    Raises:
        CheckpointError: groups of different sizes.
    """
    import torch

    from exporter.quantize._contract import Quantized

    groups, inputs = len(scale), len(q)
    if inputs % groups:
        raise CheckpointError(f"{inputs} input channels cannot be dealt out among {groups} scales of one block size.")
    block, order = inputs // groups, None
    scale = scale.float().contiguous()
    if group is not None and not torch.equal(group.long(), torch.arange(inputs) // block):
        if (torch.bincount(group.long(), minlength=groups) != block).any():
            raise CheckpointError(f"g_idx does not give every one of the {groups} groups {block} input channels.")
        order = torch.argsort(group.long(), stable=True)
        q = q[order]
    if (scale < 0).any():
        raise CheckpointError("some scales are negative, which TensorRT refuses.")
    offset = None
    if zero is not None and bool((zero != 0).any()):
        offset = -block * scale * zero.float()
    return Quantized.of(q, scale, 4, offset, order)
