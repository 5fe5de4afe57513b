"""FP32 islands in FP16 graphs, where calibration data show that float16 is too small.

The graphs are run in float32 on questions, and the largest magnitude of every tensor is noted. A tensor that comes near float16's
largest value becomes float32, and with it every node that makes or reads it; where an island ends there is a Cast. Norms, softmax and
scores are float32 anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter.backends._contract import Array, Runner
from exporter.errors import EnvironmentMismatch, ExportError, UsageError
from exporter.graphset import GraphSet
from exporter.plan import Plan
from exporter.runtime import images
from exporter.runtime.generate import Generator, embedding
from exporter.stages._lookup import spell_out
from exporter.stages._processor import prompt_of
from exporter.stages._task import Question
from exporter.workspace import SCRATCH

LARGEST = 65504.0
"""Of float16."""
MARGIN = 0.5
"""What calibration data may reach of it: others may go further."""
NEW_TOKENS = 4
BATCH = 4
PREFIX = "largest of "
HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


@dataclass(frozen=True)
class Island:
    """A tensor that is float32 for its size. largest: magnitude on the calibration data; nodes: those that make or read it."""

    file: str
    tensor: str
    largest: float
    nodes: tuple[str, ...]


def insert(
    plan: Plan, graphs: GraphSet, folder: Path, questions: Sequence[Question], log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Widen the graphs in `folder` where the questions ask for it; returns the islands as data.

    Raises:
        UsageError: no questions, or an output of a graph does not fit float16. EnvironmentMismatch: no ONNX Runtime.
    """
    if not questions:
        raise UsageError("No calibration data to look for overflows with: pass --calibration FILE.jsonl.")
    found: list[Island] = []
    for file, largest in measure(plan, graphs, folder, questions).items():
        over = {name: value for name, value in largest.items() if not value <= MARGIN * LARGEST}  # NaN too
        if not over:
            continue
        model = ir.load(folder / file)
        found += widen(model, over, file)
        ir.save(model, folder / file)
    for island in found:
        log(
            f"{island.file}: {island.tensor} reaches {island.largest:.3g}, near the end of float16; FP32: {', '.join(island.nodes)}"
        )
    return [asdict(island) for island in found]


def measure(plan: Plan, graphs: GraphSet, folder: Path, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """File → tensor that a node makes → its largest magnitude in float32."""
    largest: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for file, roles in graphs.roles().items():
            twin = folder / f"{SCRATCH}{file}"
            stack.callback(twin.unlink, missing_ok=True)
            model = ir.load(folder / file)
            spell_out(model)
            in_float32(model)
            ir.save(model, twin)
            largest[file] = {}
            runners |= dict.fromkeys(roles, _Watched(twin, largest[file]))
        generator, prompt = Generator(runners, graphs, embedding(folder, graphs)), prompt_of(plan)
        for start in range(0, len(questions), BATCH):
            some = questions[start : start + BATCH]
            ids = [prompt.ask(q.question, graphs.visual.placeholders, graphs.visual.media) for q in some]
            pixels = np.concatenate([images.preprocess(q.frames, graphs.image) for q in some])
            generator.generate(pixels, ids, NEW_TOKENS, side=prompt.side([q.question for q in some]))
    return largest


class _Watched(Runner):
    """A graph whose outputs beginning with `PREFIX` are kept apart: the largest of each so far."""

    def __init__(self, path: Path, largest: dict[str, float]) -> None:
        try:
            import onnxruntime
        except ImportError as e:
            raise EnvironmentMismatch(
                "Looking for overflows runs the graphs with ONNX Runtime. Install edgetrim[ort]."
            ) from e
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._largest = largest
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
        self._inputs = {v.name: np.dtype(kinds[v.type]) for v in self._session.get_inputs()}
        self._names = [v.name for v in self._session.get_outputs()]

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._inputs

    @property
    def outputs(self) -> Sequence[str]:
        return [name for name in self._names if not name.startswith(PREFIX)]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: np.asarray(feeds[name]).astype(dtype, copy=False) for name, dtype in self._inputs.items()}
        found = dict(zip(self._names, self._session.run(None, given), strict=True))
        for name in [n for n in found if n.startswith(PREFIX)]:
            value, tensor = float(found.pop(name)), name.removeprefix(PREFIX)
            self._largest[tensor] = float(np.fmax(self._largest.get(tensor, 0.0), value)) if value == value else np.inf
        return found

    def numpy(self, value: Any) -> Array:
        return np.asarray(value)


def in_float32(model: ir.Model) -> None:
    """Make a float16 graph compute in float32 and say the largest magnitude of every tensor that was float16."""
    graph = model.graph
    watched = [v for node in graph for v in node.outputs if v.dtype == HALF and node.op_type != "DequantizeLinear"]
    for value in [*graph.initializers.values()]:
        if value.dtype == HALF:
            first = next((n for n in graph if value in n.inputs), None)
            if first is not None:
                _cast_in_front(graph, first, value, [*value.uses()])
    for node in graph:
        if node.op_type == "Cast" and node.attributes.get_int("to") == HALF.value:
            node.attributes["to"] = ir.AttrInt64("to", SINGLE.value)
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == HALF:
                wide = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
                node.attributes[name] = ir.AttrTensor(name, wide)
        for value in node.outputs:
            if value.dtype == HALF:
                value.dtype = SINGLE
    for value in graph.inputs:
        if value.dtype == HALF:
            value.dtype = SINGLE
    zero, flat = _constant(graph, "range_zero", np.zeros(1, np.float32)), _constant(graph, "range_flat", np.array([-1]))
    for value in watched:

        def node_(op: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
            made = ir.Node("", op, inputs, [ir.AttrInt64(k, v) for k, v in attributes.items()])
            graph.append(made)
            return made.outputs[0]

        magnitude = node_("Reshape", [node_("Abs", [value]), flat])
        most = node_("ReduceMax", [node_("Concat", [magnitude, zero], axis=0)], keepdims=0)  # some are empty
        most.name, most.type, most.shape = f"{PREFIX}{value.name}", ir.TensorType(SINGLE), ir.Shape([])
        graph.outputs.append(most)


def widen(model: ir.Model, over: Mapping[str, float], file: str = "") -> list[Island]:
    """Make the tensors of `over` float32, and with them the nodes that make or read them.

    Raises:
        UsageError: one of them leaves the graph.
    """
    graph = model.graph
    wide = {v for node in graph for v in node.outputs if v.name in over and v.dtype == HALF}
    for value in wide:
        if value.is_graph_output():
            raise UsageError(
                f"{file}: the output `{value.name}` reaches {over[value.name or '']:.3g}, and float16 ends at {LARGEST:.0f}. Choose a "
                'profile with compute = "fp32".'
            )
    islands = [
        Island(
            file, value.name or "", float(f"{over[value.name or '']:.4g}"),
            tuple(n.name or "" for n in [value.producer(), *value.consumers()] if n is not None),
        )
        for value in sorted(wide, key=lambda v: v.name or "")
    ]  # fmt: skip
    inside = [n for n in graph if any(v in wide for v in (*n.inputs, *n.outputs) if v is not None)]
    for value in wide:
        value.dtype = SINGLE
    for node in inside:
        if node.op_type == "Cast":
            if node.outputs[0] in wide:
                node.attributes["to"] = ir.AttrInt64("to", SINGLE.value)
            continue
        for index, given in enumerate(node.inputs):
            if given is None or given.dtype != HALF:
                continue
            source = given.producer()
            if source is not None and source.op_type == "DequantizeLinear":
                _widen_scale(graph, source)
            else:
                _cast_in_front(
                    graph, node, given, [use for use in given.uses() if use.node is node and use.idx == index]
                )
        for made in node.outputs:
            if made.dtype == HALF:
                _cast_behind(graph, node, made)
    return islands


def _widen_scale(graph: ir.Graph, node: ir.Node) -> None:
    """A scale of its own in float32, in the graph itself: a Cast would hide from runtimes that this is a constant."""
    scale = node.inputs[1]
    if scale is None or scale.const_value is None or len(node.outputs[0].uses()) != 1:
        raise ExportError(f"{node.name} is read in FP32 and in FP16. Please report this.")
    node.replace_input_with(1, _constant(graph, f"{scale.name}.fp32", scale.const_value.numpy().astype(np.float32)))
    node.outputs[0].dtype = SINGLE


def _constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return graph.initializers[name]


def _cast_in_front(graph: ir.Graph, node: ir.Node, value: ir.Value, uses: Sequence[Any]) -> None:
    """These uses of a value read it as float32; `node` is the first of them."""
    out = ir.Value(name=f"{value.name}.fp32_{node.name}", shape=value.shape, type=ir.TensorType(SINGLE))
    cast = ir.Node(
        "", "Cast", [value], [ir.AttrInt64("to", SINGLE.value)], outputs=[out], name=f"{node.name}/fp32_{value.name}"
    )
    for use in uses:
        use.node.replace_input_with(use.idx, out)
    graph.insert_before(node, cast)


def _cast_behind(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """A node that computes in float32 hands float16 on."""
    users, place = list(value.uses()), graph.outputs.index(value) if value.is_graph_output() else None
    out = ir.Value(name=f"{value.name}.fp16", shape=value.shape, type=ir.TensorType(HALF))
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", HALF.value)], outputs=[out], name=f"{node.name}/fp16")
    graph.insert_after(node, cast)
    for use in users:
        use.node.replace_input_with(use.idx, out)
    if place is not None:
        graph.outputs[place] = out
        out.name, value.name = value.name, f"{value.name}.fp32"
    value.dtype = SINGLE
