"""FP16 and INT4 exports."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.backends.ort import OnnxRuntime
from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.quantize import rtn
from exporter.quantize._contract import block_size
from exporter.runtime.generate import Generator
from exporter.stages._modules import load_reference
from exporter.stages._reference import reference
from exporter.stages.export import export
from exporter.stages.validate import cosine
from tests.families import tiny
from tests.stages.conftest import Engine, Export, Exported

QUANTIZED = 4 * 5
"""qkv, o, gate, up, down of four layers."""


@pytest.fixture(scope="module")
def int4(exported: Export) -> Exported:
    return exported("llava", ("fastv",), 1, "cpu_int4")


@pytest.fixture(scope="module")
def fp16(exported: Export) -> Exported:
    return exported("llava", ("visionzip:keep=8", "fastv:keep=4"), 1, "rtx_fp16")


def load(found: Exported, file: str) -> Any:
    return onnx.load(found.folder / file, load_external_data=False)


@pytest.mark.parametrize("file", ["decode.onnx", "prefill.onnx"])
def test_int4_weights_stand_in_the_graph(file: str, int4: Exported) -> None:
    graph = load(int4, file).graph
    tensors = {t.name: t for t in graph.initializer}
    users = {name: node for node in graph.node for name in node.input}
    nodes = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    assert len(nodes) == QUANTIZED
    for node in nodes:
        attributes = {a.name: a.i for a in node.attribute}
        packed, scale = (tensors[name] for name in node.input)
        inputs, outputs = packed.dims
        assert attributes["axis"] == 0
        assert attributes["block_size"] in int4.plan.profile.precision.blocks
        assert packed.data_type == onnx.TensorProto.INT4
        assert list(scale.dims) == [inputs // attributes["block_size"], outputs]
        size = next(int(e.value) for e in packed.external_data if e.key == "length")
        assert size == inputs * outputs // 2
        user = users[node.output[0]]
        assert user.op_type == "MatMul"
        assert user.input[1] == node.output[0]
    head = tensors["lm_head.weight"]
    assert head.data_type == onnx.TensorProto.FLOAT


def test_only_the_language_model_is_quantised(int4: Exported) -> None:
    for file in ("vision.onnx", "reduce.onnx"):
        assert "DequantizeLinear" not in {n.op_type for n in load(int4, file).graph.node}


@pytest.mark.parametrize("file", ["decode.onnx", "prefill.onnx"])
def test_onnx_runtime_fuses_every_quantised_matmul(file: str, int4: Exported, tmp_path: Path) -> None:
    record = OnnxRuntime(threads=1).build(int4.folder / file, ("decode",), [], tmp_path, {}, lambda text: None)
    kernels = record.details["kernels"]
    assert kernels["MatMulNBits"] == QUANTIZED
    assert "DequantizeLinear" not in kernels


def dequantized(found: Exported) -> Generator:
    """The PyTorch reference with the weights that the INT4 graph stands for."""
    modules = load_reference(found.plan)
    blocks = found.plan.profile.precision.blocks
    for name, parameter in modules.decode.named_parameters():
        if parameter.ndim == 2 and name != "lm_head.weight":
            block = block_size(parameter.shape[0], tuple(blocks))
            assert block is not None
            parameter.data = rtn.quantize(parameter.data, block).dequantized()
    runners, graphs, table = reference(found.plan, modules)
    return Generator(runners, tiny.endless(graphs), table)


def test_int4_is_the_dequantised_weights_and_nothing_else(int4: Exported, engine: Engine) -> None:
    theirs, ours, exact = dequantized(int4), engine(int4), int4.theirs()
    asked = tiny.question(int4.graphs)
    visual = theirs.reduce(theirs.vision(asked.pixels))
    expected, found = (g.prefill(visual, [asked.prompt]) for g in (theirs, ours))
    assert (expected.kept["kept_2"] == found.kept["kept_2"]).all()
    assert np.abs(found.logits - expected.logits).max() <= 1e-4 * np.abs(expected.logits).max()
    assert not np.allclose(exact.prefill(visual, [asked.prompt]).logits, expected.logits, atol=1e-2)
    tokens = [g.generate(asked.pixels, [asked.prompt], 32).tokens for g in (theirs, ours)]
    assert tokens[0] == tokens[1]


def test_every_weight_of_an_fp16_export_is_fp16(fp16: Exported) -> None:
    for file in sorted(set(fp16.graphs.files.values())):
        weights = [t for t in load(fp16, file).graph.initializer if t.external_data]
        assert {t.data_type for t in weights} == {onnx.TensorProto.FLOAT16}
    assert np.load(fp16.folder / "embedding.npy").dtype == np.float16


def test_fp16_keeps_the_same_tokens(fp16: Exported, engine: Engine) -> None:
    theirs, ours = fp16.theirs(), engine(fp16)
    asked = tiny.question(fp16.graphs)
    expected, found = (g.reduce(g.vision(asked.pixels)) for g in (theirs, ours))
    assert found.embeds.dtype == np.float16
    assert (found.index == expected.index).all()
    assert cosine(found.embeds, expected.embeds) > 0.9999
    true, half = theirs.prefill(expected, [asked.prompt]), ours.prefill(found, [asked.prompt])
    assert (true.kept["kept_2"] == half.kept["kept_2"]).all()
    assert cosine(half.logits, true.logits) > 0.999


@pytest.mark.parametrize(
    "name", ["model.language_model.layers.1.mlp.up_proj.weight", "model.language_model.embed_tokens.weight"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_fit_fp16_is_refused(name: str, dtype: torch.dtype, fp16: Exported, tmp_path: Path) -> None:
    tensors = load_file(fp16.plan.checkpoint.folder / "model.safetensors")
    found = next(key for key in tensors if fp16.plan.family.canonical(key) == fp16.plan.family.canonical(name))
    tensors[found] = tensors[found].to(dtype)
    tensors[found].view(-1)[7] = 1e5
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, fp16.plan.family.canonical)
    checkpoint.config = fp16.plan.checkpoint.config
    with pytest.raises(
        CheckpointError, match=r"does not fit float16 \(largest value (1e\+05|9\.98e\+04)\)\. Use an fp32 profile"
    ):
        export(replace(fp16.plan, checkpoint=checkpoint), _empty(tmp_path / "out"))


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_profile_of_a_run_shows_int4_kernels(int4: Exported, tmp_path: Path) -> None:
    """What ONNX Runtime says it ran: every quantised product by MatMulNBits, nothing dequantised on the way."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "run")
    session = onnxruntime.InferenceSession(int4.folder / "decode.onnx", options, providers=["CPUExecutionProvider"])
    feeds = {}
    for value in session.get_inputs():
        sizes = [d if isinstance(d, int) else {"batch": 1, "seq": 2}.get(d, 3) for d in value.shape]
        feeds[value.name] = np.zeros(sizes, np.float32 if "float" in value.type else np.int64)
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = Counter(e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time"))
    assert ran["MatMulNBits"] == QUANTIZED
    assert "DequantizeLinear" not in ran


@pytest.fixture(scope="module")
def int8(exported: Export) -> Exported:
    return exported("llava", ("fastv",), 1, "cpu_int8")


def test_int8_weights_have_a_scale_per_output_channel(int8: Exported) -> None:
    graph = load(int8, "decode.onnx").graph
    tensors = {t.name: t for t in graph.initializer}
    nodes = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    assert len(nodes) == QUANTIZED
    for node in nodes:
        packed, scale = (tensors[name] for name in node.input)
        assert {a.name: a.i for a in node.attribute} == {"axis": 1}
        assert packed.data_type == onnx.TensorProto.INT8
        assert list(scale.dims) == [packed.dims[1]]
        assert next(int(e.value) for e in packed.external_data if e.key == "length") == packed.dims[0] * packed.dims[1]


def test_int8_is_the_nearest_of_255_values(int8: Exported, engine: Engine) -> None:
    modules = load_reference(int8.plan)
    for name, parameter in modules.decode.named_parameters():
        if parameter.ndim == 2 and name != "lm_head.weight":
            step = parameter.data.abs().amax(0) / 127
            parameter.data = (parameter.data / step).round() * step
    runners, graphs, table = reference(int8.plan, modules)
    theirs, ours, exact = Generator(runners, tiny.endless(graphs), table), engine(int8), int8.theirs()
    asked = tiny.question(int8.graphs)
    visual = theirs.reduce(theirs.vision(asked.pixels))
    expected, found, true = (g.prefill(visual, [asked.prompt]).logits for g in (theirs, ours, exact))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert cosine(found, true) > 0.999


def test_onnx_runtime_fuses_int8_too(int8: Exported, tmp_path: Path) -> None:
    record = OnnxRuntime(threads=1).build(int8.folder / "decode.onnx", ("decode",), [], tmp_path, {}, lambda text: None)
    assert record.details["kernels"]["MatMulNBits"] == QUANTIZED
