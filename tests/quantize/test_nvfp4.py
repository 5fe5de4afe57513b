"""NVFP4 weights: their encoding against ml_dtypes, the graphs against ONNX's reference and in ONNX Runtime, and an engine."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from benchmarks.quantize import first_logits
from exporter.cost.count import Load, count
from exporter.engines import open_runners
from exporter.errors import UsageError
from exporter.job import Job
from exporter.lint import _table
from exporter.lint._check import lint
from exporter.pipeline import run_build, run_export
from exporter.quantize import nvfp4
from exporter.runtime.generate import Generator
from exporter.stages import _task
from exporter.stages._lookup import spell_out
from exporter.stages._modules import load_reference
from exporter.stages._processor import prompt_of
from exporter.stages._reference import reference
from exporter.stages.export import export
from exporter.stages.validate import cosine
from exporter.workspace import Workspace
from profiles import _schema
from tests.conftest import needs_rtx
from tests.families import tiny

Floats = npt.NDArray[np.float32]
KNOWING = ("tensorrt-10.16", "tensorrt-11.4", "tensorrt_rtx-1.7")
"""The tables of TensorRTs that have FP4."""


def test_codes_are_those_of_ml_dtypes() -> None:
    """Every quarter up to beyond the largest number, where all ties are, and numbers between."""
    ties = np.arange(-32, 33, dtype=np.float32) / 4
    x = np.concatenate([ties, np.float32([-0.0]), np.random.default_rng(0).normal(0, 3, 4000).astype(np.float32)])
    assert np.array_equal(nvfp4.encode(torch.from_numpy(x)).numpy(), x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


def slow(weight: Floats) -> tuple[npt.NDArray[np.uint8], Floats, np.float32]:
    """Codes [in, out], scales [in / 16, out] and the scale of these, block by block."""
    whole = np.abs(weight).max() / np.float32(6 * 256)
    codes, scales = np.zeros(weight.shape, np.uint8), np.zeros((len(weight) // 16, weight.shape[1]), np.float32)
    for row, column in np.ndindex(scales.shape):
        block = weight[16 * row : 16 * row + 16, column]
        least = np.inf
        for top in (6, 4):
            wanted = np.abs(block).max() / np.float32(top) / whole
            scale = max(np.float32(wanted).astype(ml_dtypes.float8_e4m3fn).astype(np.float32), np.float32(2**-9))
            numbers = (block / (scale * whole)).astype(ml_dtypes.float4_e2m1fn)
            error = ((numbers.astype(np.float64) * scale * whole - block) ** 2).sum()
            if error < least:
                least, scales[row, column] = error, scale
                codes[16 * row : 16 * row + 16, column] = numbers.view(np.uint8)
    return codes, scales, whole


def test_every_block_becomes_the_nearest() -> None:
    weight = torch.randn(64, 200, generator=torch.manual_seed(0)) * torch.logspace(-4, 2, 200)
    weight[:, 3] = 0
    weight[16:32, 7] = torch.linspace(-4, 4, 16)  # nearer to the numbers up to 4 than to those up to 6
    weight[7, 9] = -500  # a column of small numbers behind a large one
    found = nvfp4.QUANTIZER.quantize(weight, 16)
    codes, scales, whole = slow(weight.numpy())
    assert found.whole == whole
    assert np.array_equal(found.scale.numpy(), scales)
    assert np.array_equal(found.q.numpy().reshape(64, 100), codes[:, 0::2] | codes[:, 1::2] << 4)
    numbers = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(found.dequantized().numpy(), numbers * np.repeat(scales * whole, 16, 0))
    assert {4, 6} <= {*np.abs(numbers).reshape(4, 16, 200).max(1).reshape(-1).tolist()}


def test_four_over_six_is_never_worse_than_six() -> None:
    """Against blocks whose largest weight is always 6."""
    weight = torch.randn(256, 64, generator=torch.manual_seed(1))
    blocks = weight.t().reshape(-1, 16).numpy()
    six = np.abs(blocks).max(1, keepdims=True) / np.float32(6)
    plain = (blocks / six).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * six
    found = nvfp4.QUANTIZER.quantize(weight, 16).dequantized()
    assert (found - weight).square().mean() < ((plain - blocks) ** 2).mean()


def graph(folder: Path, rows: int = 32, columns: int = 6) -> tuple[onnx.ModelProto, Floats]:
    """x @ an FP4 matrix in a file, and the matrix by ml_dtypes."""
    random = np.random.default_rng(2)
    codes = random.integers(0, 16, (rows, columns), dtype=np.uint8)
    scales = random.uniform(0.01, 400, (rows // 16, columns)).astype(ml_dtypes.float8_e4m3fn)
    whole = np.float32(3e-4)
    packed = codes.reshape(-1)[0::2] | codes.reshape(-1)[1::2] << 4
    tensors = [
        helper.make_tensor("w", TensorProto.FLOAT4E2M1, codes.shape, packed.tobytes(), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT8E4M3FN, scales.shape, scales.tobytes(), raw=True),
        numpy_helper.from_array(whole, "g"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["s", "g"], ["sd"]),
        helper.make_node("DequantizeLinear", ["w", "sd"], ["wd"], axis=0, block_size=16),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", s]) for n, s in (("x", rows), ("y", columns)))
    model = helper.make_model(
        helper.make_graph(nodes, "fp4", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 23)], ir_version=11
    )
    onnx.save(model, folder / "fp4.onnx", save_as_external_data=True, location="fp4.data", size_threshold=0)
    numbers = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return model, numbers * np.repeat(scales.astype(np.float32) * whole, 16, 0)


def test_the_lookup_is_what_onnx_defines(tmp_path: Path) -> None:
    _, matrix = graph(tmp_path)
    model = ir.load(tmp_path / "fp4.onnx")
    assert spell_out(model)
    ir.save(model, tmp_path / "lookup.onnx")
    onnx.checker.check_model(str(tmp_path / "lookup.onnx"), full_check=True)
    assert not spell_out(ir.load(tmp_path / "lookup.onnx"))
    x = np.eye(32, dtype=np.float32)
    (expected,) = ReferenceEvaluator(onnx.load(tmp_path / "fp4.onnx")).run(None, {"x": x})
    (found,) = onnxruntime.InferenceSession(tmp_path / "lookup.onnx").run(None, {"x": x})
    assert np.array_equal(found, expected) and np.array_equal(found, matrix)


def test_the_graph_has_what_was_stored(tmp_path: Path) -> None:
    """FP4 by ml_dtypes, at 4.5 bits a weight and 4 bytes a matrix; the lookup reads the same bytes; the estimate's bytes are the
    file's; and only tables of a TensorRT without FP4 refuse it."""
    plan = Job("embedded", ("visionzip:keep=32",), "rtx_5090_nvfp4").plan()
    graphs = export(plan, tmp_path)
    assert graphs.lookup == {"decode.onnx": "decode.lookup.onnx"}
    model = onnx.load(tmp_path / "decode.onnx")
    onnx.checker.check_model(str(tmp_path / "decode.onnx"), full_check=True)
    tensors = {t.name: t for t in model.graph.initializer}
    name = "layers.0.mlp.down_proj.weight"
    q, scale, whole = (tensors[f"{name}.{suffix}"] for suffix in ("fp4", "scale", "whole"))
    kinds = TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT
    assert (q.data_type, scale.data_type, whole.data_type) == kinds
    weight = plan.checkpoint.tensor("text.layers.0.mlp.down_proj.weight").float().t().numpy()
    codes, scales, expected = slow(weight)
    rows, columns = q.dims
    assert q.raw_data == (codes[:, 0::2] | codes[:, 1::2] << 4).tobytes()
    assert scale.raw_data == scales.astype(ml_dtypes.float8_e4m3fn).tobytes()
    assert whole.raw_data == expected.tobytes()
    assert len(q.raw_data) + len(scale.raw_data) == rows * columns * 4.5 / 8
    of = {n.output[0]: n for n in model.graph.node}
    (product,) = [n for n in model.graph.node if n.op_type == "MatMul" and of.get(n.input[1], n).name.startswith(name)]
    cast = of[product.input[1]]
    second = of[cast.input[0]]
    first = of[second.input[1]]
    assert [n.op_type for n in (first, second, cast)] == ["DequantizeLinear", "DequantizeLinear", "Cast"]
    assert [*first.input] == [scale.name, whole.name] and second.input[0] == q.name
    spelled = onnx.load(tmp_path / "decode.lookup.onnx", load_external_data=False)
    where = {t.name: {e.key: e.value for e in t.external_data} for t in spelled.graph.initializer}
    kept = onnx.load(tmp_path / "decode.onnx", load_external_data=False)
    assert where[f"{q.name}.bytes"] == next(
        {e.key: e.value for e in t.external_data} for t in kept.graph.initializer if t.name == q.name
    )
    held = sum(len(t.raw_data) for t in model.graph.initializer if t.name.startswith(("layers.", "norm", "lm_head")))
    work = count(plan, Load(1, 8, 8), Load(1, 8, 8))
    assert next(e for e in work.engines if e.name == "llm").weight_bytes == held
    refusing = {n for n in _table.names() if any(lint(tmp_path / "decode.onnx", _table.load(n)))}
    assert refusing == set(_table.names()) - set(KNOWING)


def test_onnx_runtime_answers_with_these_weights(tmp_path: Path) -> None:
    """Where there is no GPU, on the graph without FP4: what PyTorch says with the same weights, but for float16."""
    work = Workspace(tmp_path)
    job = Job("embedded", ("visionzip:keep=32",), "rtx_5090_nvfp4")
    run_export(job, work)
    plan, questions = job.plan(), _task.embedded(1, 4)
    modules = load_reference(plan)
    for name, weight in modules.decode.named_parameters():
        if weight.ndim == 2 and not name.startswith(("lm_head", "embed")):
            weight.data = nvfp4.QUANTIZER.quantize(weight.data, 16).dequantized()
    expected = first_logits(Generator(*reference(plan, modules)), prompt_of(plan), questions)
    with open_runners(tmp_path, job.loaded_profile()) as (runners, graphs, table, words):
        assert words.endswith(", on the graphs of rtx_5090_nvfp4")
        found = first_logits(Generator(runners, graphs, table), prompt_of(plan), questions)
    assert cosine(found, expected) > 0.9999
    assert cosine(first_logits(Generator(*reference(plan)), prompt_of(plan), questions), expected) < 0.9999


@needs_rtx
def test_tensorrt_rtx_keeps_them(tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 16}
    tiny.llava(tmp_path / "model", **wide)
    sizes = {}
    for profile in ("rtx_5090_nvfp4", "rtx_5090_fp16"):
        (tmp_path / profile).mkdir()
        work = Workspace(tmp_path / profile)
        run_export(Job(str(tmp_path / "model"), ("uniform:keep=8",), profile), work)
        sizes[profile] = next(r for r in run_build(work) if "decode" in r.roles).details["weights_bytes"]
    assert sizes["rtx_5090_nvfp4"] < 0.4 * sizes["rtx_5090_fp16"]


@pytest.mark.parametrize(
    ("profile", "changes"),
    [
        ("rtx_5090_nvfp4", {"compute": "fp32"}),
        ("rtx_4090_fp8", {"weights": "nvfp4"}),
        ("cpu_int8", {"weights": "nvfp4"}),
    ],
)
def test_where_it_does_not_exist(profile: str, changes: dict[str, str], tmp_path: Path) -> None:
    text = (_schema.FOLDER / f"{profile}.toml").read_text()
    for key, value in changes.items():
        found = getattr(_schema.load(profile).precision, key)
        text = text.replace(f'{key} = "{found}"', f'{key} = "{value}"')
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(
        UsageError, match=r'"nvfp4" goes with compute = "fp16", backend "trt" and GPUs from SM 10\.0 on'
    ):
        _schema.load(tmp_path / "mine.toml")
