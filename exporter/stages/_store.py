"""Weights to disk: one external data file, written tensor by tensor, shared by the graphs that use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType

import onnx_ir as ir
import torch

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.journal import DataFile, Journal
from exporter.quantize import rtn
from exporter.stages._split import blocks_of_columns, split_matmuls
from exporter.stages._trace import symbolic
from exporter.weights import FileSource, Source

ALIGN = 4096
"""Page size: runtimes memory-map initializers only from aligned offsets."""
SLICE = 4 * 2**20
"""Bytes of a tensor that are converted at a time. Memory of this size is used again and again; that of a whole matrix the system
would clear, page by page, for every one."""
COLUMNS = 64
"""Columns of a matrix that are transposed at a time, at least: two bytes of each fill a line of the processor's cache."""

Progress = Callable[[int], None]


class WeightFile:
    """An external data file. `attach` turns the symbolic weights of a model into initializers that point into it."""

    def __init__(
        self, path: Path, journal: Journal, checkpoint: Checkpoint, sources: dict[str, Source], dtype: torch.dtype,
        int4_blocks: tuple[int, ...] = (), progress: Progress = lambda n: None, largest: int | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            journal: of the folder; tensors that it knows are not written again.
            sources: parameter name → where it comes from.
            dtype: float dtype of everything that is not quantised.
            int4_blocks: block sizes to try, largest first; empty: no quantisation. Only weights of MatMul nodes with two
                dimensions are quantised, and never the LM head or a method's own tensors.
            progress: called with the number of checkpoint bytes done.
            largest: bytes that one matrix of a MatMul may have; larger ones are split in blocks of columns. None: any.
        """
        self.checkpoint, self.sources, self.dtype = checkpoint, dict(sources), dtype
        self.blocks, self.progress, self.largest = int4_blocks, progress, largest
        self.written: dict[str, ir.ExternalTensor] = {}
        self._file = DataFile(path, journal)

    def __enter__(self) -> WeightFile:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def attach(self, model: ir.Model) -> None:
        """Write what is not yet written and make the model's symbolic weights point at it."""
        for value in symbolic(model):
            self._split(model, value)
        for value in symbolic(model):
            assert value.name is not None
            model.graph.inputs.remove(value)
            source = self.sources[value.name]
            block = self._block(value, source)
            if block is None:
                self._point(model, value, self._float(value.name, source))
            else:
                self._dequantize(model, value, source, block)

    def _block(self, value: ir.Value, source: Source) -> int | None:
        if not self.blocks or source.name.startswith("head.") or len(source.shape) != 2 or source.shape[1] % 2:
            return None
        if isinstance(source, FileSource):  # what a method chooses by is small, and choosing is not forgiving
            return None
        if any(_other_than_matmul(use) for use in value.uses()):
            return None
        return rtn.block_size(source.shape[0], self.blocks)

    def _split(self, model: ir.Model, value: ir.Value) -> None:
        """Only matrices that nothing but MatMul reads; others are looked up by row, or small."""
        source = self.sources[value.name or ""]
        if self.largest is None or len(source.shape) != 2 or any(_other_than_matmul(use) for use in value.uses()):
            return
        bits = 8 * self.dtype.itemsize if self._block(value, source) is None else 4
        if math.prod(source.shape) * bits > 8 * self.largest:
            blocks = blocks_of_columns(source, bits, self.largest)
            names = [f"{value.name}.columns_{block.start}" for block in blocks]
            split_matmuls(model, value, names, [block.shape[1] for block in blocks])
            self.sources.update(zip(names, blocks, strict=True))

    def _point(self, model: ir.Model, value: ir.Value, tensor: ir.ExternalTensor) -> None:
        value.const_value = tensor
        value.metadata_props.clear()
        model.graph.initializers[value.name or ""] = value

    def _dequantize(self, model: ir.Model, value: ir.Value, source: Source, block: int) -> None:
        name = value.name or ""
        if f"{name}.int4" not in self.written:
            self._write_int4(name, source, block)
        packed, scale = self.written[f"{name}.int4"], self.written[f"{name}.scale"]
        inputs = []
        for suffix, tensor_ in (("int4", packed), ("scale", scale)):
            part = ir.Value(name=f"{name}.{suffix}", shape=ir.Shape(tensor_.shape), type=ir.TensorType(tensor_.dtype))
            self._point(model, part, tensor_)
            inputs.append(part)
        out = ir.Value(name=f"{name}.dequantized", shape=ir.Shape(source.shape), type=ir.TensorType(scale.dtype))
        node = ir.Node(
            "", "DequantizeLinear", inputs, [ir.AttrInt64("axis", 0), ir.AttrInt64("block_size", block)],
            outputs=[out], name=f"{name}/DequantizeLinear",
        )  # fmt: skip
        uses = list(value.uses())
        first = (
            min((use.node for use in uses), key=lambda n: list(model.graph).index(n)) if len(uses) > 1 else uses[0].node
        )
        model.graph.insert_before(first, node)
        for use in uses:
            use.node.replace_input_with(use.idx, out)

    def _write_int4(self, name: str, source: Source, block: int) -> None:
        inputs, outputs = source.shape
        packed = inputs * outputs // 2
        behind = packed + -packed % ALIGN
        part = self._file.part(name, self._quantized(name, source, block), ALIGN)
        self._place(f"{name}.int4", part.offset, packed, source.shape, ir.DataType.INT4)
        self._place(f"{name}.scale", part.offset + behind, part.size - behind, (inputs // block, outputs))
        self.progress(source.bytes(self.checkpoint))

    def _float(self, name: str, source: Source) -> ir.ExternalTensor:
        if name not in self.written:
            part = self._file.part(name, self._converted(name, source), ALIGN)
            self._place(name, part.offset, part.size, source.shape)
            self.progress(source.bytes(self.checkpoint))
        return self.written[name]

    def _converted(self, name: str, source: Source) -> Iterator[memoryview]:
        for rows in slices(source.read(self.checkpoint)):
            yield as_bytes(to_dtype(name, rows, self.dtype))

    def _quantized(self, name: str, source: Source, block: int) -> Iterator[memoryview]:
        """The integers, and, aligned as well, their scales."""
        tensor = source.read(self.checkpoint)
        check_range(name, tensor, self.dtype)  # what is dequantised has to fit, not only the scale
        packed, scale = rtn.quantize(tensor, block)
        yield as_bytes(packed)
        yield memoryview(bytes(-packed.numel() % ALIGN))
        yield as_bytes(scale.to(self.dtype))

    def _place(self, name: str, offset: int, size: int, shape: Iterable[int], dtype: ir.DataType | None = None) -> None:
        kind = dtype or (ir.DataType.FLOAT16 if self.dtype == torch.float16 else ir.DataType.FLOAT)
        path = self._file.path
        self.written[name] = ir.ExternalTensor(
            path.name, offset, size, kind, shape=ir.Shape(shape), name=name, base_dir=path.parent
        )


def _other_than_matmul(use: tuple[ir.Node, int]) -> bool:
    return use[0].op_type != "MatMul" or use[1] != 1


def slices(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of a tensor, some at a time, contiguous. What lies in memory as it is wanted is not copied."""
    rows = torch.atleast_1d(tensor)
    count = max(1, SLICE * len(rows) // max(1, rows.numel() * rows.element_size()))
    if rows.is_contiguous():
        yield from rows.split(count)
    elif rows.ndim == 2:
        for some in rows.split(max(COLUMNS, count)):
            yield some.t().contiguous().t().contiguous()  # straight from rows to columns it takes several times as long
    else:
        yield rows.contiguous()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def to_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Converted; what is of that dtype already is taken as it is. Raises CheckpointError where a value does not fit; `name` is
    the tensor's."""
    if tensor.dtype != dtype:
        check_range(name, tensor, dtype)
    return tensor.to(dtype)


def check_range(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises CheckpointError where a value does not fit `dtype`; `name` is the tensor's."""
    if dtype != torch.float16:
        return
    low, high = (end.float() for end in tensor.aminmax())
    largest = torch.maximum(-low, high)
    if not torch.isfinite(largest.to(dtype)):
        raise CheckpointError(f"`{name}` does not fit float16 (largest value {largest:.3g}). Use an fp32 profile.")
