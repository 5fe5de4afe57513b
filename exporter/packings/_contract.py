"""How a published checkpoint holds quantised matrices, and what layouts have in common: integers packed into words,
NVFP4, eight bits with a scale per channel."""

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
    def check(self, config: Mapping[str, Any]) -> None:
        """Raises CheckpointError for a variant that is not read."""

    def numbers(self, config: Mapping[str, Any], parts: Parts) -> str | None:
        """What a matrix's numbers are called (`Form.numbers`) where `quantized` gives them; None: it is only read as floats."""
        return None

    def quantized(self, config: Mapping[str, Any], parts: Parts) -> Quantized:
        """The matrix [in, out] without loss; only asked for where it has `numbers`."""
        raise AssertionError(f"{parts.name} has no numbers")

    def read(self, config: Mapping[str, Any], parts: Parts) -> Tensor:
        """The matrix as float32 [in, out]; only asked for where it has no `numbers`."""
        raise AssertionError(f"{parts.name} has numbers")


@dataclass(frozen=True)
class Matrix:
    """One matrix of a quantised checkpoint."""

    packing: Packing
    config: Mapping[str, Any]
    parts: Parts

    @cached_property
    def numbers(self) -> str | None:
        return self.packing.numbers(self.config, self.parts)

    def quantized(self) -> Quantized:
        return self.packing.quantized(self.config, self.parts)

    def read(self) -> Tensor:
        """float32 [in, out]"""
        if self.numbers is not None:
            return self.quantized().dequantized()
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


def nvfp4(packed: Tensor, scale: Tensor, whole: Tensor) -> Quantized:
    """E2M1 codes, E4M3 scales and the scale of these as the matrix [in, out] that they are.

    Args:
        packed: uint8 [out, in / 2], the first of two in the low half. scale: float8_e4m3fn [out, in / 16]. whole: float32, one.
    Raises:
        CheckpointError: other types or shapes, or a scale that is no positive number.
    """
    import torch

    from exporter.quantize._contract import Quantized
    from exporter.quantize.nvfp4 import BLOCK, FORM, LEAST

    outputs, pairs = packed.shape
    if (
        packed.dtype != torch.uint8
        or scale.dtype != torch.float8_e4m3fn
        or scale.shape != (outputs, 2 * pairs // BLOCK)
    ):
        raise CheckpointError(
            f"NVFP4 of {outputs} × {2 * pairs} has to be uint8 with {outputs} × {2 * pairs // BLOCK} scales in float8_e4m3fn, blocks of "
            f"{BLOCK}; found {packed.dtype} with {' × '.join(map(str, scale.shape))} in {scale.dtype}."
        )
    scales, factor = scale.float(), float(whole) if whole.numel() == 1 else 0.0
    if not 0 < factor < float("inf") or not bool((scales >= 0).all()):
        raise CheckpointError("scales of NVFP4 have to be positive numbers, and that of the whole matrix one.")
    codes = torch.stack([packed & 0xF, packed >> 4], 2).view(outputs, -1)
    empty = scales == 0  # TensorRT refuses zero: zeros with the smallest scale are the same
    codes = codes.masked_fill(empty.repeat_interleave(BLOCK, 1), 0)
    by_input = codes.t()
    q = (by_input[:, 0::2] | (by_input[:, 1::2] << 4)).contiguous().view(-1)
    return Quantized(FORM, q, scales.masked_fill(empty, LEAST).t().contiguous(), whole=factor)


def eight_bits(parts: Parts) -> str | None:
    """ "int8" or "fp8" where `weight` [out, in] has one scale for all, or one per output channel; else None."""
    import torch

    weight, scale = parts("weight"), parts("weight_scale")
    by_row = scale.numel() == len(weight) == scale.shape[0] if scale.ndim else False
    if weight.ndim != 2 or not (scale.numel() == 1 or by_row):
        return None
    return {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(weight.dtype)


def per_channel(weight: Tensor, scale: Tensor) -> Quantized:
    """int8 or float8_e4m3fn [out, in] and the scales of `eight_bits` as the matrix [in, out] that they are."""
    import torch

    from exporter.quantize._contract import Form, Quantized

    outputs, inputs = weight.shape
    floats = weight.dtype == torch.float8_e4m3fn
    scales = scale.float().reshape(1, -1).expand(1, outputs).contiguous()
    if not bool((scales >= 0).all()):
        raise CheckpointError("scales of eight bits have to be positive numbers.")
    empty = scales == 0  # as above
    numbers = weight.view(torch.uint8 if floats else torch.int8).t().masked_fill(empty, 0).contiguous()
    return Quantized(Form(8, inputs, floats=floats), numbers.view(-1), scales.masked_fill(empty, 1))


def spread(scale: Tensor, weight: Tensor) -> Tensor:
    """Scales, one for all, for each row, for each group of a row or each rectangle, as many as there are weights [out, in]."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        return scale[:, None]
    for axis in (0, 1):
        if scale.shape[axis] not in (1, weight.shape[axis]):
            size = -(-weight.shape[axis] // scale.shape[axis])
            size = 1 << (size - 1).bit_length() if weight.shape[axis] % scale.shape[axis] else size
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, weight.shape[axis])
    return scale
