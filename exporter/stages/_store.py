"""Weights to disk: one external data file, written tensor by tensor, shared by the graphs that use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

import exporter.quantize
from exporter import _discover
from exporter.checkpoint import Checkpoint
from exporter.cost.work import BITS
from exporter.errors import CheckpointError
from exporter.journal import DataFile, Journal, Part
from exporter.quantize._contract import Form, Quantized, Quantizer
from exporter.stages._split import blocks_of_columns, split_matmuls
from exporter.stages._trace import symbolic
from exporter.weights import FileSource, Source

if TYPE_CHECKING:
    from profiles._schema import Precision

ALIGN = 4096
"""Page size: runtimes memory-map initializers only from aligned offsets."""
SLICE = 4 * 2**20
"""Bytes of a tensor that are converted at a time. Memory of this size is used again and again; that of a whole matrix the system
would clear, page by page, for every one."""
AHEAD = 3
"""Tensors that the system is asked to read while another one is written."""
COLUMNS = 64
"""Columns of a matrix that are transposed at a time, at least: two bytes of each fill a line of the processor's cache."""

Progress = Callable[[int], None]


class WeightFile:
    """An external data file. `attach` turns the symbolic weights of a model into initializers that point into it."""

    def __init__(
        self, path: Path, journal: Journal, checkpoint: Checkpoint, sources: Mapping[str, Source], dtype: torch.dtype,
        quantize: Precision | None = None, progress: Progress = lambda n: None,
        largest: int | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            journal: of the folder; tensors that it knows are not written again.
            sources: parameter name → where it comes from.
            dtype: float dtype of everything that is not quantised.
            quantize: how; None: nothing is. Only weights of MatMul nodes with two dimensions are quantised, and never the LM
                head or a method's own tensors.
            progress: called with the number of checkpoint bytes done.
            largest: bytes that one matrix of a MatMul may have; larger ones are split in blocks of columns. None: any.
        """
        self.checkpoint, self.sources, self.dtype = checkpoint, dict(sources), dtype
        self.precision, self.progress, self.largest = quantize, progress, largest
        self.written: dict[str, ir.ExternalTensor] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        """Of every matrix that was to be quantised: its form, and what else its writer noted."""
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
        values = symbolic(model)
        for i, value in enumerate(values):
            assert value.name is not None
            for coming in values[1 : AHEAD + 1] if i == 0 else values[i + AHEAD : i + AHEAD + 1]:
                if not self._file.keeps:
                    self.sources[coming.name or ""].expect(self.checkpoint)
            model.graph.inputs.remove(value)
            source = self.sources[value.name]
            if value.name not in self.written and value.name not in self.notes:
                self._stream(value, source)
            if value.name in self.written:
                self._point(model, value, self.written[value.name])
            else:
                self._dequantize(model, value, source.shape, _form(self.notes[value.name]))

    def _stream(self, value: ir.Value, source: Source) -> None:
        """Write one tensor of the checkpoint."""
        name = value.name or ""
        if self._stays(value, source):
            self.store(name, lambda: (self._published(source), {}))
            return
        form = self._chosen(value, source)
        pieces = self._converted(name, source) if form is None else self._quantized(name, source, form)
        self._place(name, source.shape, form, self._part(name, pieces, {} if form is None else form.record()))
        self.progress(source.bytes(self.checkpoint))

    def _part(self, name: str, pieces: Iterable[memoryview], note: Mapping[str, Any]) -> Part:
        part = self._file.part(name, pieces, ALIGN, note)
        if part.note:
            self.notes[name] = part.note
        return part

    def store(self, name: str, make: Callable[[], tuple[Quantized | torch.Tensor, dict[str, Any]]]) -> None:
        """Write a tensor that does not stand in the checkpoint as it will be.

        Args:
            name: the parameter's. make: the tensor [in, out] and what to note of it; not called if it is there from before.
        """
        part, source = self._file.kept(name, ALIGN), self.sources[name]
        if part is None:
            value, note = make()
            if isinstance(value, Quantized):
                note = value.form.record() | note
                check_range(name, value.largest, self.dtype)
                part = self._part(name, self._laid_out(value), note)
            else:
                part = self._part(name, [as_bytes(to_dtype(name, value.contiguous(), self.dtype))], note)
        if part.note:
            self.notes[name] = part.note
        self._place(name, source.shape, _form(part.note), part)
        self.progress(source.bytes(self.checkpoint))

    def stored(self, name: str) -> torch.Tensor:
        """What a parameter that was written is now, float32."""
        form = _form(self.notes.get(name, {}))
        if form is None:
            return self._bytes(name).float()
        assert not form.nested, "only what was calibrated is asked for"
        kind = torch.int8 if form.numbers == "int8" else torch.uint8
        scale = self._bytes(f"{name}.scale").float()
        return Quantized(
            form, self._bytes(f"{name}.{form.numbers}", kind).view(-1), scale.view(-1, scale.shape[-1])
        ).dequantized()

    def _bytes(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = self.written[name]
        assert tensor.offset is not None and tensor.length is not None
        raw = np.fromfile(self._file.path, np.uint8, tensor.length, offset=tensor.offset)
        found = torch.from_numpy(raw).view(dtype or self.dtype)
        return found if dtype else found.view(tensor.shape.numpy())

    def quantizable(self, source: Source) -> Form | None:
        """How a matrix of the checkpoint is to be quantised; None: it is not. Method's own tensors are small, and choosing is not
        forgiving; the LM head decides what is said."""
        if self.precision is None or source.name.startswith("head.") or len(source.shape) != 2 or source.shape[1] % 2:
            return None
        if isinstance(source, FileSource):
            return None
        return rounding(self.precision).form(source.shape[0], self.precision.blocks)

    def _chosen(self, value: ir.Value, source: Source) -> Form | None:
        return self.quantizable(source) if _is_matrix(value) else None

    def _stays(self, value: ir.Value, source: Source) -> bool:
        """Whether the checkpoint has it in the profile's type already, and may keep it."""
        wanted = KEPT.get(self.precision.weights) if self.precision is not None else None
        return wanted is not None and _is_matrix(value) and source.numbers(self.checkpoint) == wanted

    def _published(self, source: Source) -> Quantized:
        """A matrix as the checkpoint has it quantised; INT4 in blocks that the profile takes, all else has one form."""
        assert self.precision is not None
        found = source.quantized(self.checkpoint)
        if found.form.numbers != "int4":
            return found
        block = next((b for b in self.precision.blocks if found.form.block % b == 0), None)
        if block is None:
            raise CheckpointError(
                f"{self.checkpoint.folder}: `{source.name}` has INT4 blocks of {found.form.block}, the profile takes "
                f"{', '.join(map(str, self.precision.blocks))}. Choose a profile with {found.form.block} in `blocks`, or one "
                "without INT4."
            )
        return found.divided(block)

    def _split(self, model: ir.Model, value: ir.Value) -> None:
        """Only matrices that nothing but MatMul reads; others are looked up by row, or small."""
        source = self.sources[value.name or ""]
        if self.largest is None or len(source.shape) != 2 or any(_other_than_matmul(use) for use in value.uses()):
            return
        if value.name in self.written or value.name in self.notes:
            return
        form = self._chosen(value, source)
        bits = 8 * self.dtype.itemsize if form is None else form.bits
        if self.precision is not None and self._stays(value, source):
            bits = BITS[self.precision.weights]
        if math.prod(source.shape) * bits > 8 * self.largest:
            blocks = blocks_of_columns(source, bits, self.largest)
            names = [f"{value.name}.columns_{block.start}" for block in blocks]
            split_matmuls(model, value, names, [block.shape[1] for block in blocks])
            self.sources.update(zip(names, blocks, strict=True))

    def _point(self, model: ir.Model, value: ir.Value, tensor: ir.ExternalTensor) -> None:
        value.const_value = tensor
        value.metadata_props.clear()
        model.graph.initializers[value.name or ""] = value

    def _dequantize(self, model: ir.Model, value: ir.Value, shape: tuple[int, ...], form: Form | None) -> None:
        """DequantizeLinear in front of the MatMuls that read it; what an offset and an order stand for, at their inputs.

        Nested scales are dequantised by one of their own. Both are float32 then, as NVIDIA's ModelOpt writes them: in float16 the
        scale of a whole matrix would lose bits."""
        assert form is not None
        name = value.name or ""
        uses = list(value.uses())
        first = (
            min((use.node for use in uses), key=lambda n: list(model.graph).index(n)) if len(uses) > 1 else uses[0].node
        )

        def node(op: str, inputs: list[ir.Value], suffix: str, dtype: ir.DataType, **attributes: int) -> ir.Value:
            made = ir.Value(name=f"{name}.{suffix}", shape=inputs[0].shape, type=ir.TensorType(dtype))
            given = [ir.AttrInt64(key, number) for key, number in attributes.items()]
            label = f"{made.name}/{op}" if suffix != "dequantized" else f"{name}/{op}"
            model.graph.insert_before(first, ir.Node("", op, inputs, given, outputs=[made], name=label))
            return made

        numbers, scale = (self._initializer(model, f"{name}.{suffix}") for suffix in (form.numbers, "scale"))
        if form.block == shape[0] and form.bits == 8:
            out = node("DequantizeLinear", [numbers, scale], "dequantized", self._kind, axis=1)
        elif form.nested:
            whole = self._initializer(model, f"{name}.whole")
            scale = node("DequantizeLinear", [scale, whole], "scale.dequantized", ir.DataType.FLOAT)
            out = node("DequantizeLinear", [numbers, scale], "wide", ir.DataType.FLOAT, axis=0, block_size=form.block)
            if self._kind != ir.DataType.FLOAT:
                out = node("Cast", [out], "dequantized", self._kind, to=self._kind.value)
            model.graph.opset_imports[""], model.ir_version = FP4_OPSET, FP4_IR_VERSION
        else:
            out = node("DequantizeLinear", [numbers, scale], "dequantized", self._kind, axis=0, block_size=form.block)
        for use in uses:
            use.node.replace_input_with(use.idx, out)
            if form.order:
                _reorder(model.graph, use.node, self._initializer(model, f"{name}.order"), name)
            if form.offset:
                _add_offset(model.graph, use.node, self._initializer(model, f"{name}.offset"), form.block, name)

    def _initializer(self, model: ir.Model, name: str) -> ir.Value:
        if name in model.graph.initializers:
            return model.graph.initializers[name]
        tensor = self.written[name]
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
        self._point(model, value, tensor)
        return value

    def _converted(self, name: str, source: Source) -> Iterator[memoryview]:
        for rows in slices(source.read(self.checkpoint)):
            yield as_bytes(to_dtype(name, rows, self.dtype))

    def _quantized(self, name: str, source: Source, form: Form) -> Iterator[memoryview]:
        assert self.precision is not None
        found = rounding(self.precision).quantize(source.read(self.checkpoint), form.block)
        check_range(name, found.largest, self.dtype)
        yield from self._laid_out(found)

    def _laid_out(self, found: Quantized) -> Iterator[memoryview]:
        """The integers, and, aligned as well, what goes with them."""
        yield as_bytes(found.q)
        size = found.q.numel()
        scales: tuple[torch.Tensor, ...] = (found.scale.clamp_min(SMALLEST).to(self.dtype),)
        if found.form.nested:
            scales = found.scale.to(torch.float8_e4m3fn), torch.tensor(found.whole)
        for tensor in (*scales, _to(found.offset, self.dtype), found.order):
            if tensor is not None:
                yield memoryview(bytes(-size % ALIGN))
                yield as_bytes(tensor.contiguous())
                size += -size % ALIGN + tensor.numel() * tensor.element_size()

    def _place(self, name: str, shape: tuple[int, ...], form: Form | None, part: Part) -> None:
        """Remember where the tensors of a part are."""
        if form is None:
            self._tensor(name, part.offset, shape, self._kind)
            return
        inputs, outputs = shape
        scales = (outputs,) if form.bits == 8 and form.block == inputs else (inputs // form.block, outputs)
        end = self._tensor(f"{name}.{form.numbers}", part.offset, shape, NUMBERS[form.numbers])
        end = self._tensor(f"{name}.scale", end, scales, ir.DataType.FLOAT8E4M3FN if form.nested else self._kind)
        if form.nested:
            end = self._tensor(f"{name}.whole", end, (), ir.DataType.FLOAT)
        if form.offset:
            end = self._tensor(f"{name}.offset", end, scales, self._kind)
        if form.order:
            self._tensor(f"{name}.order", end, (inputs,), ir.DataType.INT64)

    def _tensor(self, name: str, offset: int, shape: tuple[int, ...], dtype: ir.DataType) -> int:
        """Returns where it ends."""
        path, offset = self._file.path, offset + -offset % ALIGN
        size = math.ceil(math.prod(shape) * dtype.itemsize)
        self.written[name] = ir.ExternalTensor(
            path.name, offset, size, dtype, shape=ir.Shape(shape), name=name, base_dir=path.parent
        )
        return offset + size

    @property
    def _kind(self) -> ir.DataType:
        return ir.DataType.FLOAT16 if self.dtype == torch.float16 else ir.DataType.FLOAT


SMALLEST = 2.0**-24
"""Of a scale: in float16 anything smaller is zero, which TensorRT refuses. So are weights that it is the scale of, or nearly."""
KEPT = {"int4": "int4", "int8": "int8", "fp8": "fp8", "nvfp4": "fp4"}
"""What a profile's `weights` are called in a checkpoint that has them already."""
NUMBERS = {
    "int4": ir.DataType.INT4, "int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN, "fp4": ir.DataType.FLOAT4E2M1,
}  # fmt: skip
FP4_OPSET, FP4_IR_VERSION = 23, 11
"""The first with FP4."""


def rounding(precision: Precision) -> Quantizer:
    """What quantises a matrix that nothing was learnt about."""
    name = "rtn" if precision.weights == "int4" else precision.weights
    found: Quantizer = _discover.load(exporter.quantize, "quantizer", name).QUANTIZER
    return found


def _form(note: Mapping[str, Any]) -> Form | None:
    """What a note says of it."""
    known = {f.name for f in fields(Form)}
    return Form(**{k: v for k, v in note.items() if k in known}) if "bits" in note else None


def _to(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _is_matrix(value: ir.Value) -> bool:
    """Whether it is only ever multiplied with, from the right."""
    return not any(_other_than_matmul(use) for use in value.uses())


def _reorder(graph: ir.Graph, product: ir.Node, order: ir.Value, name: str) -> None:
    """The channels of a product's input in the order of its matrix's rows."""
    x = product.inputs[0]
    assert x is not None
    out = ir.Value(name=f"{name}.ordered_{product.name}", shape=x.shape, type=x.type)
    gather = ir.Node("", "Gather", [x, order], [ir.AttrInt64("axis", -1)], outputs=[out], name=f"{product.name}/Gather")
    graph.insert_before(product, gather)
    product.replace_input_with(0, out)


def _add_offset(graph: ir.Graph, product: ir.Node, offset: ir.Value, block: int, name: str) -> None:
    """What the zero points take off: the mean of every block of the input, times the matrix's offsets. The mean, not the sum, which
    could leave float16."""
    x, y = product.inputs[0], product.outputs[0]
    assert x is not None and x.shape is not None
    lead, stem = list(x.shape[:-1]), product.name

    def node(op: str, inputs: list[ir.Value], shape: list[Any], **attributes: int) -> ir.Value:
        made = ir.Value(name=f"{stem}.{op.lower()}", shape=ir.Shape(shape), type=y.type)
        given = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        graph.insert_after(nodes[-1], new := ir.Node("", op, inputs, given, outputs=[made], name=f"{stem}/{op}"))
        nodes.append(new)
        return made

    def constant(suffix: str, values: list[int]) -> ir.Value:
        tensor = ir.tensor(np.array(values, np.int64), name=f"{stem}.{suffix}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape([len(values)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
        )
        graph.initializers[value.name or ""] = value
        return value

    nodes, blocks = [product], offset.shape[0] if offset.shape is not None else None
    users = list(y.uses())
    output = y.is_graph_output()
    assert not output, f"{stem} is an output of the graph"
    split = node("Reshape", [x, constant("blocks", [*[0] * len(lead), -1, block])], [*lead, blocks, block])
    means = node("ReduceMean", [split, constant("last", [-1])], [*lead, blocks], keepdims=0)
    less = node("MatMul", [means, offset], list(y.shape or []))
    total = node("Add", [y, less], list(y.shape or []))
    for use in users:
        use.node.replace_input_with(use.idx, total)


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
