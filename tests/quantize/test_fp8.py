"""FP8 weights: their encoding against ml_dtypes, the graph in ONNX Runtime, and an engine."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from exporter.cost.count import Load, count
from exporter.errors import UsageError
from exporter.job import Job
from exporter.lint import _table
from exporter.lint._check import lint
from exporter.pipeline import run_export
from exporter.quantize import fp8
from exporter.stages.build import build
from exporter.stages.export import export
from exporter.workspace import Workspace
from profiles import _schema
from tests.conftest import needs_rtx
from tests.families import tiny


def test_every_weight_becomes_the_nearest_of_its_channel() -> None:
    weight = torch.randn(60, 200, generator=torch.manual_seed(0)) * torch.logspace(-4, 3, 200)
    weight[:, 3] = 0
    found = fp8.QUANTIZER.quantize(weight, 60)
    scale = np.maximum(np.abs(weight.numpy()).max(0), 1e-8) / np.float32(448)
    np.testing.assert_allclose(found.scale[0].numpy(), scale, rtol=1e-6)
    nearest = (weight.numpy() / found.scale[0].numpy()).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(found.q.numpy(), nearest.view(np.uint8).reshape(-1))
    expected = nearest.astype(np.float32) * found.scale[0].numpy()
    assert np.array_equal(found.dequantized().numpy(), expected)


def test_the_graph_multiplies_what_was_stored(tmp_path: Path) -> None:
    """The bytes in the file are E4M3 by ml_dtypes; the estimate's bytes are the file's; tables of GPUs that have FP8 take it."""
    plan = Job("embedded", ("visionzip:keep=32",), "rtx_4090_fp8").plan()
    export(plan, tmp_path)
    model = onnx.load(tmp_path / "decode.onnx")
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    tensors = {t.name: t for t in model.graph.initializer}
    assert len(nodes) == 5 * plan.geometry.layers
    name = "layers.0.mlp.down_proj.weight"
    q, scale = tensors[f"{name}.fp8"], tensors[f"{name}.scale"]
    assert (q.data_type, scale.data_type) == (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT16)
    stored = np.frombuffer(q.raw_data, ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(q.dims)
    weight = plan.checkpoint.tensor("text.layers.0.mlp.down_proj.weight").float().t().numpy()
    found = stored * onnx.numpy_helper.to_array(scale).astype(np.float32)
    assert np.abs(found - weight).max() <= np.abs(weight).max() * (2**-4 + 2**-10)
    most = np.abs(weight).max(0)
    assert (np.abs(found - weight) <= np.maximum(np.abs(weight) * (2**-4 + 2**-9), most * 2**-9 / 448 * 1.01)).all()
    held = sum(
        onnx.numpy_helper.to_array(t).nbytes
        for t in model.graph.initializer
        if t.name.startswith(("layers.", "norm", "lm_head"))
    )
    work = count(plan, Load(1, 8, 8), Load(1, 8, 8))
    assert next(e for e in work.engines if e.name == "llm").weight_bytes == held
    for table in _table.names():
        assert not list(lint(tmp_path / "decode.onnx", _table.load(table)))


@needs_rtx
@pytest.mark.parametrize(("eight", "half"), [("rtx_4090_fp8", "rtx_4090_fp16"), ("rtx_3090_int8", "rtx_3090_fp16")])
def test_tensorrt_rtx_keeps_eight_bits(eight: str, half: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 16}
    tiny.llava(tmp_path / "model", **wide)
    sizes = {}
    for profile in (eight, half):
        (tmp_path / profile).mkdir()
        work = Workspace(tmp_path / profile)
        graphs = run_export(Job(str(tmp_path / "model"), ("uniform:keep=8",), profile), work)
        (record,) = build(tiny.language_model(graphs), work.graphs, tmp_path, _schema.load(profile))
        sizes[profile] = record.details["weights_bytes"]
    assert sizes[eight] < 0.7 * sizes[half]


@pytest.mark.parametrize(
    ("profile", "changes"), [("rtx_4090_fp8", {"compute": "fp32"}), ("rtx_fp16", {"weights": "fp8"})]
)
def test_where_it_does_not_exist(profile: str, changes: dict[str, str], tmp_path: Path) -> None:
    text = (_schema.FOLDER / f"{profile}.toml").read_text()
    for key, value in changes.items():
        found = getattr(_schema.load(profile).precision, key)
        text = text.replace(f'{key} = "{found}"', f'{key} = "{value}"')
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError, match=r'weights = "fp8" goes with compute = "fp16" and GPUs from SM 8\.9 on'):
        _schema.load(tmp_path / "mine.toml")


def test_a_quantizer_is_for_int4() -> None:
    with pytest.raises(UsageError, match="Unknown quantizer 'fp8'"):
        Job("embedded", (), "cpu_int4", quantizer="fp8").plan()
