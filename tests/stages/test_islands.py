"""FP32 islands where float16 overflows: in a small graph by hand, and in a model with a weight scaled until it does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file

from exporter.backends._contract import Runner
from exporter.errors import UsageError
from exporter.plan import Plan
from exporter.quantize import rtn
from exporter.quantize._contract import block_size
from exporter.runtime.generate import Generator
from exporter.stages import _islands, _task
from exporter.stages._modules import load_reference
from exporter.stages._reference import reference
from exporter.stages.export import export
from exporter.stages.validate import cosine
from tests.conftest import Said
from tests.families import tiny
from tests.stages.conftest import Engine, Exported

HALF = onnx.TensorProto.FLOAT16


def chain() -> onnx.ModelProto:
    """x W0 → silu → W1 → / 4096: the products are too large for float16, what comes out is not."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(8, 8)) * scale for scale in (300, 400)]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w0"], ["a"], "first"),
        onnx.helper.make_node("Sigmoid", ["a"], ["s"], "gate"),
        onnx.helper.make_node("Mul", ["a", "s"], ["b"], "silu"),
        onnx.helper.make_node("MatMul", ["b", "w1"], ["c"], "second"),
        onnx.helper.make_node("Div", ["c", "d"], ["y"], "last"),
        onnx.helper.make_node("Neg", ["x"], ["z"], "apart"),
    ]
    arrays = {"w0": weights[0], "w1": weights[1], "d": np.array(4096.0)}
    initializers = [onnx.numpy_helper.from_array(a.astype(np.float16), n) for n, a in arrays.items()]
    values = {n: onnx.helper.make_tensor_value_info(n, HALF, ["batch", 8]) for n in "xyzabcs"}
    graph = onnx.helper.make_graph(
        nodes, "g", [values["x"]], [values["y"], values["z"]], initializers, value_info=[values[n] for n in "abcs"]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def run(model: ir.Model, x: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, {"x": x}))


def honest(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    """In float16 where the graph says so: ONNX Runtime's CPU kernels compute in float32 and would hide an overflow."""
    with np.errstate(all="ignore"):
        return list(ReferenceEvaluator(model).run(None, feeds))


class Honest(Runner):
    """`honest` as a runner."""

    def __init__(self, path: Path) -> None:
        self._model = onnx.load(path)
        kinds = {HALF: np.float16, onnx.TensorProto.INT64: np.int64}
        self._inputs = {v.name: np.dtype(kinds[v.type.tensor_type.elem_type]) for v in self._model.graph.input}

    def __enter__(self) -> Honest:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._inputs

    @property
    def outputs(self) -> Sequence[str]:
        return [v.name for v in self._model.graph.output]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        found = honest(self._model, {n: np.asarray(feeds[n], kind) for n, kind in self._inputs.items()})
        return dict(zip(self.outputs, found, strict=True))

    def numpy(self, value: Any) -> Any:
        return np.asarray(value)


def test_an_island_by_hand() -> None:
    x = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float16) * 4
    twin = ir.serde.deserialize_model(chain())
    _islands.in_float32(twin)
    exact, _, *largest = run(twin, x.astype(np.float32))
    found = {
        o.name.removeprefix(_islands.PREFIX): float(v) for o, v in zip(twin.graph.outputs[2:], largest, strict=True)
    }
    with np.errstate(over="ignore"):
        a = x.astype(np.float32) @ onnx.numpy_helper.to_array(chain().graph.initializer[0]).astype(np.float32)
    assert found["a"] == pytest.approx(np.abs(a).max(), rel=1e-5)
    assert found["a"] < 65504 * 0.5 < 65504 < found["c"]
    plain = ir.serde.deserialize_model(chain())
    assert not np.isfinite(honest(chain(), {"x": x})[0]).all()
    over = {n: v for n, v in found.items() if v > 65504 * 0.5}
    assert set(over) == {"c"}
    (island,) = _islands.widen(plain, over)
    assert island.nodes == ("second", "last")
    onnx.checker.check_model(ir.serde.serialize_model(plain), full_check=True)
    y, z = honest(ir.serde.serialize_model(plain), {"x": x})
    assert y.dtype == z.dtype == np.float16
    assert np.allclose(y, exact, rtol=1e-2, atol=1)
    assert np.allclose(run(plain, x)[0], y, rtol=1e-2, atol=1)
    assert (z == -x).all()
    kinds = {n.name: n.op_type for n in plain.graph}
    assert kinds["apart"] == "Neg"
    assert not [n for n in plain.graph if n.op_type == "Cast" and n.inputs[0].name in ("x", "w0")]


def test_an_output_that_is_too_large_is_refused() -> None:
    model = ir.serde.deserialize_model(chain())
    with pytest.raises(UsageError, match="the output `y` reaches 1e\\+05, and float16 ends at 65504"):
        _islands.widen(model, {"y": 1e5}, "g.onnx")


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLP whose inside is 30,000 times larger, and its result thirty times."""
    folder = tmp_path_factory.mktemp("overflowing")
    tiny.llava(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    up, down = (
        next(n for n in tensors if n.endswith(f"layers.1.mlp.{part}_proj.weight") and "language" in n)
        for part in ("up", "down")
    )
    tensors[up] *= 3e4
    tensors[down] /= 1e3
    save_file(tensors, file, {"format": "pt"})
    return folder


def fp16(folder: Path, profile: str, islands: str) -> Plan:
    plan = tiny.plan(folder, (), None, profile)
    return replace(plan, profile=replace(plan.profile, precision=replace(plan.profile.precision, islands=islands)))


@pytest.mark.parametrize("profile", ["rtx_fp16", "rtx_int4"])
def test_a_model_that_overflows(
    profile: str, overflowing: Path, engine: Engine, tmp_path: Path, monkeypatch: Any
) -> None:
    questions = _task.for_calibration(1, 4)
    monkeypatch.setattr(_islands, "prompt_of", lambda plan: Asking(plan))
    log: list[str] = []
    found, bare = {}, None
    for islands in ("auto", "none"):
        plan = fp16(overflowing, profile, islands)
        folder = tmp_path / islands
        folder.mkdir()
        bare = Exported(plan, folder, export(plan, folder, log.append, questions))
        asked = tiny.question(bare.graphs)
        run = engine(bare)
        visual = run.reduce(run.vision(asked.pixels))
        decode = Honest(folder / "decode.onnx")
        runners = {"vision": run._vision, "reduce": run._reduce, "prefill": decode, "decode": decode}
        slow = Generator(runners, bare.graphs, run._embedding)
        found[islands] = slow.prefill(visual, [asked.prompt]).logits.astype(np.float32)
        if islands == "auto":
            assert cosine(run.prefill(visual, [asked.prompt]).logits, found[islands]) > 0.9999
    assert bare is not None
    modules = load_reference(plan)
    if plan.profile.precision.weights == "int4":
        for name, parameter in modules.decode.named_parameters():
            if parameter.ndim == 2 and name != "lm_head.weight":
                block = block_size(len(parameter), plan.profile.precision.blocks)
                assert block is not None
                parameter.data = rtn.quantize(parameter.data, block).dequantized()
    runners, graphs, table = reference(plan, modules)
    theirs = Generator(runners, tiny.endless(graphs), table)
    expected = theirs.prefill(theirs.reduce(theirs.vision(asked.pixels)), [asked.prompt]).logits
    assert not np.isfinite(found["none"]).all()
    assert cosine(found["auto"], expected) > 0.9999
    record = json.loads((tmp_path / "auto/precision.json").read_text())
    names = {node for island in record["islands"] for node in island["nodes"]}
    assert {island["file"] for island in record["islands"]} == {"decode.onnx"}
    assert {name.rpartition("/")[0] for name in names} <= {
        f"layers/1/mlp{part}" for part in ("", "/up_proj", "/down_proj")
    }
    assert any("near the end of float16" in line for line in log)
    graph = onnx.load(tmp_path / "auto/decode.onnx", load_external_data=False).graph
    assert not list((tmp_path / "auto").glob(".tmp-*"))
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.elem_type in (HALF, onnx.TensorProto.INT64)


class Asking:
    """A prompt that says what tiny models are asked, whatever the question is."""

    def __init__(self, plan: Plan) -> None:
        _, self.graphs, _ = reference(plan)

    def ask(self, *rest: Any) -> list[int]:
        return list(tiny.question(self.graphs).prompt)

    def side(self, texts: Any) -> dict[str, Any]:
        return {}


def test_asked_for_on_the_command_line(edgetrim: Callable[..., Said], tmp_path: Path) -> None:
    """The embedded model does not come near float16's end, and the record says that it was looked at."""
    asked = ("export", "embedded", "-r", "visionzip:keep=8", "--islands", "auto")
    said = edgetrim(*asked, "-p", "cpu_fp32", "-o", tmp_path / "none")
    assert (said.code, said.err) == (
        2,
        "Error: --islands auto is for FP16, and profile `cpu_fp32` computes in FP32. Leave it out, or choose one with FP16, see "
        "`edgetrim list profiles`.\n",
    )
    assert edgetrim(*asked, "-p", "rtx_3090_fp16", "-o", tmp_path / "out").code == 0
    record = json.loads((tmp_path / "out/graphs/precision.json").read_text())
    assert record["islands"] == [] and record["calibration_questions"] > 0
