"""export: checkpoint + reductions → ONNX graphs with the reductions traced in.

Modules are built on the meta device and traced without weights; then the checkpoint's tensors are streamed, one at a
time, into the external data files. Memory peaks at one tensor, whatever the model.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from exporter import __version__
from exporter.checkpoint import Stored
from exporter.flavours._apply import apply
from exporter.graphset import GraphSet, bucket_role
from exporter.journal import DataFile, Journal
from exporter.nn.clip_text import ClipText
from exporter.nn.reduce import Reduce
from exporter.plan import Plan, Step
from exporter.runtime.question import InstructionTokenizer, QuestionTokenizer
from exporter.stages import _calibrate, _islands
from exporter.stages._describe import describe, reduce_inputs, reduce_outputs
from exporter.stages._draw import DTYPES as TORCH
from exporter.stages._draw import Shape, draw
from exporter.stages._llm import buckets, draw_llm
from exporter.stages._lookup import apply as lookup
from exporter.stages._modules import DTYPES, build_modules, origins
from exporter.stages._processor import write_processor
from exporter.stages._store import WeightFile, as_bytes, slices, to_dtype
from exporter.trained import trained_tensors
from exporter.transfer import Transfer
from exporter.weights import Source, text_embeddings
from plugins._apply import apply as plug

if TYPE_CHECKING:
    from exporter.stages._task import Question

PRECISION = "precision.json"
"""How the matrices of a quantised language model are stored, and which nodes of a float16 graph compute in float32."""

Log = Callable[[str], None]


def export(plan: Plan, folder: Path, log: Log = lambda text: None, calibration: Sequence[Question] = ()) -> GraphSet:
    """Write the plan's graphs into `folder` and return their description.

    Args:
        folder: empty, or as an export that was killed left it: what it had finished of this plan is kept.
        calibration: questions whose activations may be looked at, by a quantiser or for overflows.
    Raises:
        CheckpointError: weights that are missing, damaged or of another shape; a CLIP checkpoint without its tokenizer.
        ExportError: the folder holds something else.
        UsageError: a quantiser that does not fit, or has no calibration data.
    """
    if plan.clip is not None:  # what a runtime will need: refused now, not there
        QuestionTokenizer.load(plan.clip.folder)
    if plan.instruction is not None:
        InstructionTokenizer.load(plan.instruction)
    precision = plan.profile.precision
    dtype = DTYPES[precision.compute]
    modules = build_modules(plan)
    calibrated = _calibrate.wanted(plan)
    if calibrated:
        _calibrate.check(plan, modules)
    found = origins(plan, modules)
    embedding = Source("text.embed_tokens.weight", (plan.geometry.vocab, plan.geometry.hidden), False)
    advance = Transfer(_bytes(plan, found, embedding), "writing weights", log).advance
    data = _calibrate.fingerprint(calibration) if calibration else None
    journal = Journal(folder, made_from(plan) | {"calibration": data})
    for module in modules.stored().values():
        _cast(module, dtype)
    if modules.prefill is not modules.decode:
        _cast(modules.prefill, dtype)

    if plan.family.caution:
        log(f"warning: {plan.family.caution}")
    log("tracing vision")
    vision = draw_vision(plan, modules.vision, dtype)
    log("tracing reduction")
    reduce = draw_reduce(plan, modules.reduce, vision, dtype)
    log("tracing decode")
    decode = draw_llm(plan, modules.decode, dtype)
    files = {"vision": "vision.onnx", "reduce": "reduce.onnx", "prefill": "decode.onnx", "decode": "decode.onnx"}
    models = [("vision", vision), ("reduce", reduce), ("decode", decode)]
    if modules.prefill is not modules.decode:
        log("tracing prefill")
        files["prefill"] = "prefill.onnx"
        models.append(("prefill", draw_llm(plan, modules.prefill, dtype)))
    for number, bucket in enumerate(buckets(plan)):
        role = bucket_role(number)
        files[role] = f"{role}.onnx"
        models.append((role, bucket.draw(dtype)))
    if modules.question is not None:
        log("tracing question")
        files["question"] = "question.onnx"
        models.append(("question", draw_question(modules.question)))

    log("writing weights")
    quantize = None if precision.weights == "none" else precision
    block_mib = plan.profile.memory.largest_block_mib
    largest = None if block_mib is None else block_mib << 20
    with ExitStack() as stack:
        if quantize is None:
            stack.enter_context(_one_thread())

        def weight_file(name: str) -> WeightFile:
            path = folder / f"{name}.data"
            how = quantize if name == "llm" else None
            file = WeightFile(path, journal, plan.checkpoint, found[name], dtype, how, advance, largest)
            return stack.enter_context(file)

        weight_files = {name: weight_file(name) for name in found}
        if calibrated:
            _calibrate.calibrate(plan, weight_files["llm"], calibration, log)
        for role, model in models:
            weight_files.get(role, weight_files["llm"]).attach(model)
            model.graph.name = f"edgetrim_{role}"
            ir.save(model, folder / files[role])
    for file in folder.glob("*.data"):
        if file.stat().st_size == 0:
            file.unlink()
    _write_embedding(plan, embedding, folder / "embedding.npy", journal, dtype)
    advance(embedding.bytes(plan.checkpoint))
    write_processor(plan, folder / "processor")
    target = plan.profile.stack
    if target.flavour is not None:
        files |= apply(target.flavour, target.backend, folder, files, log, plan.places_shared)
    graphs = describe(plan, files, {v.name or "": static_sizes(v) for v in vision.graph.outputs})
    looked = precision.islands == "auto"
    islands = _islands.insert(plan, graphs, folder, calibration, log) if looked else []
    if quantize is not None or looked:
        record = _precision_record(plan, weight_files["llm"].notes, len(calibration), islands)
        (folder / PRECISION).write_text(json.dumps(record, indent=1) + "\n")
    graphs = replace(graphs, lookup=lookup(folder, files.values()))
    if target.plugins:
        graphs = replace(graphs, plugged=plug(target.plugins, folder, files.values(), log))
    graphs.save(folder)
    journal.close()
    return graphs


def _precision_record(
    plan: Plan, matrices: dict[str, Any], questions: int, islands: list[dict[str, Any]]
) -> dict[str, Any]:
    """How every matrix of the language model is stored, what that changes of its output, why some stay as they are, and what
    computes in float32."""
    precision = plan.profile.precision
    return {
        "compute": precision.compute,
        "weights": precision.weights,
        "quantizer": "the checkpoint's" if plan.checkpoint.quantized else precision.quantizer,
        "calibration_questions": questions,
        "matrices": matrices,
        "islands": islands,
    }


def made_from(plan: Plan) -> dict[str, Any]:
    """All that the graphs and their weights depend on, as JSON knows it."""
    own = sorted({found.file for step in plan.steps for found in _own_weights(plan, step)})
    return {
        "edgetrim": __version__,
        "torch": torch.__version__,
        "config": plan.checkpoint.config,
        "checkpoint": plan.checkpoint.fingerprint(),
        "clip": None if plan.request.clip is None else plan.request.clip.fingerprint(),
        "frames": plan.request.frames,
        "image_size": plan.request.image_size,
        "reductions": plan.record(),
        "their weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in own],
        "profile": asdict(plan.profile),
    }


def _own_weights(plan: Plan, step: Step) -> Collection[Stored]:
    return trained_tensors(plan, step).values() if step.method.trained(step.site) else ()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Pieces of a matrix are transposed as fast by one thread as by several, and while they spin nothing is written."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bytes(plan: Plan, found: dict[str, dict[str, Source]], embedding: Source) -> int:
    """What there is to read. Raises CheckpointError where a tensor is missing."""
    wanted = [source for sources in found.values() for source in sources.values()]
    return sum(source.bytes(plan.checkpoint) for source in (*wanted, embedding))


def draw_vision(plan: Plan, module: nn.Module, dtype: torch.dtype) -> ir.Model:
    image = plan.geometry.image
    shape = ("batch", plan.geometry.frames, 3, image.height, image.width)
    return draw(module, {"pixel_values": (shape, dtype)}, lambda v: module(v["pixel_values"]), plan.taps)


def draw_question(module: ClipText) -> ir.Model:
    inputs = {"question_ids": (("batch", module.spec.tokens), torch.int64)}
    return draw(module, inputs, lambda v: [module(v["question_ids"])], ["aligned_text"])


def draw_reduce(plan: Plan, module: Reduce, vision: ir.Model, dtype: torch.dtype) -> ir.Model:
    """The reduce graph; its inputs are outputs of the vision graph, then what comes from elsewhere."""
    signals: dict[str, tuple[Shape, torch.dtype]] = {}
    for value in (v for v in vision.graph.outputs if v.name in plan.for_reduce):
        assert value.name is not None and value.dtype is not None
        signals[value.name] = ("batch", *static_sizes(value)), TORCH[value.dtype]
    inputs = reduce_inputs(plan, signals, dtype)
    return draw(module, inputs, lambda v: module(*v.values()), reduce_outputs(plan.sized))


def static_sizes(value: ir.Value) -> list[int]:
    """Behind the batch axis; all static."""
    assert value.shape is not None
    found = [d for d in value.shape if isinstance(d, int)]
    assert len(found) == len(value.shape) - 1, f"{value.name} {value.shape} is not static"
    return found


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Float parameters to `dtype`; buffers (rotary frequencies, constants) stay float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _write_embedding(plan: Plan, source: Source, path: Path, journal: Journal, dtype: torch.dtype) -> None:
    spec = plan.family.decoder(plan.checkpoint)
    kind = np.dtype(np.float16 if dtype == torch.float16 else np.float32)

    def pieces() -> Iterator[memoryview]:
        header = io.BytesIO()
        described = {"descr": kind.str, "fortran_order": False, "shape": source.shape}
        np.lib.format.write_array_header_1_0(header, described)
        yield header.getbuffer()
        for rows in slices(source.read(plan.checkpoint)):
            yield as_bytes(to_dtype("embed_tokens.weight", text_embeddings(rows, spec), dtype))

    with DataFile(path, journal) as file:
        file.part(path.name, pieces())
