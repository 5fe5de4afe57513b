"""What a quantised matrix is, what a quantiser is, and what it may know of the activations that enter a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

BLOCKS = (128, 64, 32)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen codes of FP4 stand for."""


@dataclass(frozen=True)
class Form:
    """How a matrix [in, out] is stored: bits of a number (4 or 8); block: rows that share a scale; whether there is an `offset`
    (see `Quantized`), and an `order`; floats: whether the numbers are FP8 (E4M3) or FP4 (E2M1), not integers."""

    bits: int
    block: int
    offset: bool = False
    order: bool = False
    floats: bool = False

    @property
    def numbers(self) -> str:
        """What they are called: "int4", "int8", "fp8" or "fp4"."""
        return f"{'fp' if self.floats else 'int'}{self.bits}"

    @property
    def largest(self) -> float:
        """The largest magnitude of a number."""
        return {"int4": 8.0, "int8": 128.0, "fp8": 448.0, "fp4": 6.0}[self.numbers]

    @property
    def nested(self) -> bool:
        """Whether the scales are FP8 (E4M3) themselves, under one float32 scale of the whole matrix, as NVFP4 has it."""
        return self.floats and self.bits == 4

    def bytes(self, shape: tuple[int, int], itemsize: int) -> int:
        """Of a matrix's numbers and scales. itemsize: of a scale that is not nested."""
        inputs, outputs = shape
        scales = inputs // self.block * outputs
        return inputs * outputs * self.bits // 8 + (scales + 4 if self.nested else scales * itemsize)

    def record(self) -> dict[str, Any]:
        """As data, without what is not there."""
        return {key: value for key, value in asdict(self).items() if value}


@dataclass(frozen=True)
class Quantized:
    """A matrix W [in, out] as integers: x @ W = x[order] @ (scale * q) + mean(x[order]) @ offset, means taken block by block.

    Attributes:
        form: its bits and block, and which of the rest there is.
        q: the integers in memory as ONNX has them, row by row; uint8 [in * out / 2], two values per byte and the first in the
            low half, or int8 [in * out]; of FP8 the bytes.
        scale: float32 [in / block, out], positive; where it is nested, numbers that E4M3 has.
        offset: float32 [in / block, out]; what is left of zero points, which TensorRT refuses: block * scale * (centre - zero).
        order: int64 [in], the input channel that each row belongs to.
        whole: the float32 scale of nested scales.
    """

    form: Form
    q: Tensor
    scale: Tensor
    offset: Tensor | None = None
    order: Tensor | None = None
    whole: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.scale) * self.form.block, self.scale.shape[1]

    @property
    def largest(self) -> Tensor:
        """[in / block, out], what a block may be dequantised to at most."""
        return self.scale * (self.form.largest * self.whole)

    def integers(self) -> Tensor:
        """int8 [in, out]; not of floats."""
        if self.form.bits == 8:
            return self.q.view(self.shape)
        pairs = self._nibbles().view(torch.int8)
        return torch.where(pairs > 7, pairs - 16, pairs)

    def numbers(self) -> Tensor:
        """float32 [in, out], without their scales."""
        if not self.form.floats:
            return self.integers().float()
        if self.form.bits == 8:
            return self.q.view(torch.float8_e4m3fn).view(self.shape).float()
        return torch.tensor(E2M1)[self._nibbles().int()]

    def _nibbles(self) -> Tensor:
        """uint8 [in, out], of which four bits are used."""
        return torch.stack([self.q & 0xF, self.q >> 4], 1).reshape(self.shape)

    def dequantized(self) -> Tensor:
        """The float32 weight [in, out] that this stands for."""
        blocks = self.numbers().view(-1, self.form.block, self.shape[1])
        value = blocks * (self.scale * self.whole).unsqueeze(1)
        if self.offset is not None:
            value = value + (self.offset / self.form.block).unsqueeze(1)
        found = value.flatten(0, 1)
        if self.order is None:
            return found
        return torch.empty_like(found).index_copy_(0, self.order, found)

    def divided(self, block: int) -> Quantized:
        """The very same matrix in smaller blocks."""
        times = self.form.block // block
        if times == 1:
            return self
        offset = None if self.offset is None else (self.offset / times).repeat_interleave(times, 0)
        form = replace(self.form, block=block)
        return replace(self, form=form, scale=self.scale.repeat_interleave(times, 0), offset=offset)

    def columns(self, start: int, stop: int) -> Quantized:
        """Some output channels; both ends even."""
        share = 8 // self.form.bits
        q = self.q.view(self.shape[0], -1)[:, start // share : stop // share].contiguous().view(-1)
        offset = None if self.offset is None else self.offset[:, start:stop].contiguous()
        return replace(self, q=q, scale=self.scale[:, start:stop].contiguous(), offset=offset)

    @classmethod
    def of(
        cls, q: Tensor, scale: Tensor, bits: int = 4, offset: Tensor | None = None, order: Tensor | None = None
    ) -> Quantized:
        """From integers int8 [in, out], of which 4 bits hold -8..7, and `out` is even."""
        form = Form(bits, len(q) // len(scale), offset is not None, order is not None)
        return cls(form, packed(q) if bits == 4 else q.contiguous().view(-1), scale, offset, order)


def packed(q: Tensor) -> Tensor:
    """int8 [in, out] in -8..7 → uint8 [in * out / 2]."""
    nibbles = (q & 0xF).view(torch.uint8)
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous().view(-1)


def side_by_side(parts: Sequence[Quantized]) -> Quantized | None:
    """Matrices of one input as one; None where they differ in form, order or the scale of nested scales."""
    first, *rest = parts
    plain = replace(first.form, offset=False)
    if any(replace(p.form, offset=False) != plain or p.whole != first.whole for p in rest):
        return None
    if first.order is not None and any(p.order is None or not torch.equal(first.order, p.order) for p in rest):
        return None
    offset = None
    if any(p.offset is not None for p in parts):
        offset = torch.cat([torch.zeros_like(p.scale) if p.offset is None else p.offset for p in parts], 1)
    rows = first.shape[0]
    q = torch.cat([p.q.view(rows, -1) for p in parts], 1).view(-1)
    scale = torch.cat([p.scale for p in parts], 1)
    return Quantized(replace(plain, offset=offset is not None), q, scale, offset, first.order, first.whole)


def block_size(inputs: int, candidates: Sequence[int] = BLOCKS) -> int | None:
    """The first of the blocks that divides the input axis, or None."""
    return next((b for b in candidates if inputs % b == 0), None)


class Seen:
    """What entered a matrix on calibration data: how large its channels are, and some tokens, evenly spaced over all.

    Args:
        inputs: channels. gram: whether to sum x xᵀ too, which takes inputs² floats.
    """

    MOST = 512
    """Tokens kept at most; never fewer than half of it, once so many were seen."""

    def __init__(self, inputs: int, gram: bool = False) -> None:
        self.count, self._every, self._weight = 0, 1, 0.0
        self._magnitude, self._square = torch.zeros(inputs), torch.zeros(inputs)
        self._gram = torch.zeros(inputs, inputs) if gram else None
        self._rows = torch.empty(0, inputs)

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """x: float32 [tokens, in]; weight: [tokens], how much each counts, one if not given."""
        numbers = torch.arange(self.count, self.count + len(x))
        weight = torch.ones(len(x)) if weight is None else weight
        self.count, self._weight = self.count + len(x), self._weight + float(weight.sum())
        self._magnitude += weight @ x.abs()
        x = x * weight.sqrt()[:, None]
        self._square += x.square().sum(0)
        if self._gram is not None:
            self._gram.addmm_(x.t(), x)
        self._rows = torch.cat([self._rows, x[numbers % self._every == 0]])
        while len(self._rows) > self.MOST:
            self._rows, self._every = self._rows[::2].clone(), 2 * self._every

    @property
    def magnitude(self) -> Tensor:
        """[in], mean of |x|."""
        return self._magnitude / max(1.0, self._weight)

    @property
    def power(self) -> Tensor:
        """[in], mean of x²."""
        return self._square / max(1.0, self._weight)

    @property
    def rows(self) -> Tensor:
        """[tokens, in], each times the root of its weight."""
        return self._rows

    @property
    def gram(self) -> Tensor:
        """[in, in], mean of x xᵀ."""
        assert self._gram is not None, "not asked for"
        return self._gram / max(1.0, self._weight)

    def divided(self, scale: Tensor) -> Seen:
        """As if every channel had been divided by `scale` [in]."""
        found = Seen(0)
        found.count, found._every, found._weight = self.count, self._every, self._weight
        found._rows = self._rows / scale
        found._magnitude, found._square = self._magnitude / scale, self._square / scale.square()
        found._gram = None if self._gram is None else self._gram / scale / scale[:, None]
        return found

    def energy(self, matrix: Tensor) -> float:
        """Mean square of what a matrix [in, out] makes of the kept tokens."""
        return float((self._rows @ matrix).square().mean())


class Quantizer(ABC):
    """A way of choosing the numbers of a matrix: INT4, or where its file is called like another type, that one. `summary`: in words.
    calibrated: whether it looks at activations; gram: at their products too, see `Seen`."""

    summary: ClassVar[str]
    calibrated: ClassVar[bool] = True
    gram: ClassVar[bool] = False

    def form(self, inputs: int, blocks: Sequence[int]) -> Form | None:
        """Of a matrix with so many rows; None: it cannot be. blocks: that the profile takes, the preferred ones first."""
        block = block_size(inputs, blocks)
        return None if block is None else Form(4, block)

    def scale(self, weights: Sequence[Tensor], seen: Seen, block: int) -> Tensor | None:
        """[in], what to multiply the rows of these matrices with, which all read the same, and to divide what they read by,
        before they are quantised; None: nothing.

        Args:
            weights: float32 [in, out] each. block: rows that will share a scale.
        """
        return None

    @abstractmethod
    def quantize(self, weight: Tensor, block: int, seen: Seen | None = None) -> Quantized:
        """weight [in, out], any float dtype; `in` is a multiple of `block`, `out` is even. `seen` is there where the quantiser
        is a calibrated one."""
