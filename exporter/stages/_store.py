"""Weights to disk: one external data file, written tensor by tensor, shared by the graphs that use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx_ir as ir
import torch

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.quantize import rtn
from exporter.stages._trace import symbolic
from exporter.weights import FileSource, Source

ALIGN = 4096
"""Page size: runtimes memory-map initializers only from aligned offsets."""

Progress = Callable[[int], None]


class WeightFile:
    """An external data file. `attach` turns the symbolic weights of a model into initializers that point into it."""

    def __init__(
        self, path: Path, checkpoint: Checkpoint, sources: dict[str, Source], dtype: torch.dtype,
        int4_blocks: tuple[int, ...] = (), progress: Progress = lambda n: None,
    ) -> None:  # fmt: skip
        """
        Args:
            sources: parameter name → where it comes from.
            dtype: float dtype of everything that is not quantised.
            int4_blocks: block sizes to try, largest first; empty: no quantisation. Only weights of MatMul nodes with two
                dimensions are quantised, and never the LM head or a method's own tensors.
            progress: called with the number of checkpoint bytes done.
        """
        self.path, self.checkpoint, self.sources, self.dtype = path, checkpoint, sources, dtype
        self.blocks, self.progress = int4_blocks, progress
        self.written: dict[str, ir.ExternalTensor] = {}
        self.quantized: list[str] = []
        self._file: BinaryIO | None = None

    def __enter__(self) -> WeightFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def attach(self, model: ir.Model) -> None:
        """Write what is not yet written and make the model's symbolic weights point at it."""
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
        if any(node.op_type != "MatMul" or index != 1 for node, index in value.uses()):
            return None
        return rtn.block_size(source.shape[0], self.blocks)

    def _point(self, model: ir.Model, value: ir.Value, tensor: ir.ExternalTensor) -> None:
        value.const_value = tensor
        value.metadata_props.clear()
        model.graph.initializers[value.name or ""] = value

    def _dequantize(self, model: ir.Model, value: ir.Value, source: Source, block: int) -> None:
        name = value.name or ""
        if f"{name}.int4" not in self.written:
            tensor = source.read(self.checkpoint)
            quantized = rtn.quantize(tensor, block)
            self._write(f"{name}.int4", quantized.packed, ir.DataType.INT4, source.shape)
            to_dtype(
                name, tensor.float().abs().amax(), self.dtype
            )  # what is dequantised has to fit, not only the scale
            self._write(f"{name}.scale", quantized.scale.to(self.dtype), None, tuple(quantized.scale.shape))
            self.quantized.append(name)
            self.progress(tensor.numel() * tensor.element_size())
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

    def _float(self, name: str, source: Source) -> ir.ExternalTensor:
        if name not in self.written:
            tensor = source.read(self.checkpoint)
            self._write(name, to_dtype(name, tensor, self.dtype), None, source.shape)
            self.progress(tensor.numel() * tensor.element_size())
        return self.written[name]

    def _write(self, name: str, tensor: torch.Tensor, dtype: ir.DataType | None, shape: Iterable[int]) -> None:
        assert self._file is not None
        self._file.write(b"\0" * (-self._file.tell() % ALIGN))
        offset = self._file.tell()
        data = tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data
        self._file.write(data)
        kind = dtype or (ir.DataType.FLOAT16 if self.dtype == torch.float16 else ir.DataType.FLOAT)
        self.written[name] = ir.ExternalTensor(
            self.path.name, offset, data.nbytes, kind, shape=ir.Shape(shape), name=name, base_dir=self.path.parent
        )


def to_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Converted. Raises CheckpointError where a value does not fit; `name` is the tensor's."""
    cast = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != torch.float16 and not torch.isfinite(cast).all():
        raise CheckpointError(
            f"`{name}` does not fit float16 (largest value {tensor.abs().max():.3g}). Use an fp32 profile."
        )
    return cast
