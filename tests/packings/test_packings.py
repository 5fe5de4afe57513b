"""Quantised checkpoints: what is read is what was published, and the graphs hold the published integers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError, UsageError
from exporter.job import Job
from exporter.runtime.generate import Generator
from exporter.stages._reference import reference
from exporter.stages.export import export
from exporter.weights import Source, packed
from tests.families import tiny
from tests.packings import published
from tests.packings.published import GROUP, Rounded
from tests.stages.conftest import Engine, Exported, engine, plain  # noqa: F401 - a fixture

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    pack: Callable[[Rounded], dict[str, torch.Tensor]]
    symmetric: bool
    bits: int = 4
    scattered: bool = False

    def __call__(self, shape: tuple[int, int], seed: int) -> Packed:
        r = published.rounded(shape, self.symmetric, seed, self.bits, self.scattered)
        return self.pack(r), r.dequantized()


def compressed(symmetric: bool, bits: int = 4, layout: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    described = {
        "num_bits": bits,
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": GROUP,
        "type": "int",
    } | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": described}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


def gptq(**config: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False} | config


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
CASES = {
    "awq": Case(AWQ, published.awq, False),
    "gptq": Case(gptq(sym=True), published.gptq, True),
    "gptq-asymmetric-scattered": Case(gptq(desc_act=True), published.gptq, False, scattered=True),
    "gptq-v2": Case(gptq(checkpoint_format="gptq_v2"), lambda r: published.gptq(r, before=0), False),
    "compressed-tensors": Case(compressed(True), lambda r: published.compressed(r, True), True),
    "compressed-tensors-asymmetric": Case(compressed(False), lambda r: published.compressed(r, False), False),
    "compressed-tensors-scattered": Case(
        compressed(True, actorder="group"), lambda r: published.compressed(r, True), True, scattered=True
    ),
}
WIDE = {
    "gptq-8": Case(gptq(bits=8), lambda r: published.gptq(r, bits=8), False, 8),
    "compressed-tensors-8": Case(compressed(False, 8), lambda r: published.compressed(r, False, 8), False, 8),
}
EXPORTED = ["awq", "gptq-asymmetric-scattered", "compressed-tensors"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny.llava(folder)
    return folder


@pytest.fixture(scope="module")
def folders(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    done: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in done:
            case = (CASES | WIDE)[name]
            done[name] = published.publish(source, tmp_path_factory.mktemp("published"), case.config, case)
        return done[name]

    return make


def matrix(inputs: int, outputs: int, name: str) -> Source:
    return Source(f"text.layers.1.{name}.weight", (inputs, outputs), True)


def both(folder: Path) -> tuple[Checkpoint, Checkpoint]:
    plans = [tiny.plan(folder / kind, (), None, "cpu_int4") for kind in ("plain", "quantized")]
    return plans[0].checkpoint, plans[1].checkpoint


@pytest.mark.parametrize("name", [*CASES, *WIDE])
def test_what_is_read_is_what_was_published(name: str, folders: Callable[[str], Path]) -> None:
    theirs, ours = both(folders(name))
    for source in (
        matrix(64, 128, "mlp.gate_proj"),
        matrix(128, 64, "mlp.down_proj"),
        matrix(64, 32, "self_attn.v_proj"),
    ):
        assert torch.allclose(source.read(ours), source.read(theirs).float(), rtol=1e-6, atol=1e-7)
        assert source.is_int4(ours) == (name in CASES)
        assert source.bytes(ours) < source.bytes(theirs) / (2 if name in CASES else 1)


@pytest.mark.parametrize("name", CASES)
def test_integers_and_scales_are_the_published_ones(name: str, folders: Callable[[str], Path]) -> None:
    case, (_, ours) = CASES[name], both(folders(name))
    names = sorted(load_file(folders(name) / "plain/model.safetensors"))
    found = matrix(128, 64, "mlp.down_proj").int4(ours)
    number = next(i for i, n in enumerate(names) if n.endswith("layers.1.mlp.down_proj.weight"))
    expected = published.rounded((64, 128), case.symmetric, number, 4, case.scattered)
    order = np.argsort(expected.group, kind="stable")
    assert (found.integers().numpy() == expected.q.T[order] - 8).all()
    assert (found.scale.numpy() == expected.scale.T.astype(np.float32)).all()
    assert (found.offset is None) == case.symmetric
    assert (found.order is None) != case.scattered


def test_queries_keys_and_values_side_by_side(folders: Callable[[str], Path]) -> None:
    theirs, ours = both(folders("gptq-asymmetric-scattered"))
    whole = packed(
        Source("text.layers.0.self_attn.qkv_proj.weight", (64, 128), True), {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    )
    assert torch.allclose(whole.int4(ours).dequantized(), whole.read(theirs), rtol=1e-6, atol=1e-7)


def test_smaller_blocks_are_the_same_matrix(folders: Callable[[str], Path]) -> None:
    _, ours = both(folders("awq"))
    found = matrix(128, 64, "mlp.down_proj").int4(ours)
    assert found.divided(16).form.block == 16
    assert torch.allclose(found.divided(16).dequantized(), found.dequantized())


@pytest.mark.parametrize("name", EXPORTED)
def test_answers_are_those_of_the_dequantised_model(
    name: str,
    folders: Callable[[str], Path],
    engine: Engine,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder, case = folders(name), CASES[name]
    plan = tiny.plan(folder / "quantized", ("fastv:keep=4",), None, "cpu_int4")
    plan = plan if name == "awq" else plain(plan)  # a flavour finds attention behind zero points, too
    ours = Exported(plan, tmp_path, export(plan, tmp_path))
    runners, graphs, table = reference(tiny.plan(folder / "plain", ("fastv:keep=4",)))
    theirs, run = Generator(runners, tiny.endless(graphs), table), engine(ours)
    asked = tiny.question(ours.graphs)
    answers = [g.generate(asked.pixels, [asked.prompt], 16).tokens for g in (theirs, run)]
    assert answers[0] == answers[1]
    logits = [g.prefill(g.reduce(g.vision(asked.pixels)), [asked.prompt]).logits for g in (theirs, run)]
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * np.abs(logits[0]).max()
    graph = onnx.load(tmp_path / ours.graphs.files["decode"], load_external_data=False).graph
    stored = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert len(stored) == 4 * 5
    assert any(t.name.endswith(".offset") for t in graph.initializer) == (not case.symmetric)
    assert any(t.name.endswith(".order") for t in graph.initializer) == case.scattered
    record = json.loads((tmp_path / "precision.json").read_text())
    assert record["quantizer"] == "the checkpoint's"
    assert {m["block"] for m in record["matrices"].values()} == {GROUP}


def floats(kind: str) -> Callable[[tuple[int, int], int], Packed]:
    """int8 by row, and float8 by row or by squares of 16."""

    def pack(shape: tuple[int, int], seed: int) -> Packed:
        weight = torch.randn(shape, generator=torch.manual_seed(seed)) * shape[1] ** -0.5
        if kind == "fp8":
            scale = torch.rand(shape[0] // 16, shape[1] // 16) * 1e-3 + 1e-3
            wide = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
            stored = (weight / wide).to(torch.float8_e4m3fn)
            return {"weight": stored, "weight_scale_inv": scale}, stored.float() * wide
        scale = weight.abs().amax(1, keepdim=True) / 100
        rounded = (weight / scale).round()
        stored = rounded.to(torch.int8 if kind == "int" else torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale": scale.bfloat16()}, stored.float() * scale.bfloat16().float()

    return pack


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("int", compressed(True, 8, "int-quantized", strategy="channel")),
        ("float", compressed(True, 8, "float-quantized", strategy="channel", type="float")),
        ("fp8", {"quant_method": "fp8", "weight_block_size": [16, 16]}),
    ],
)
def test_eight_bits_are_dequantised(kind: str, config: dict[str, Any], source: Path, tmp_path: Path) -> None:
    theirs, ours = both(published.publish(source, tmp_path, config, floats(kind)))
    for found in (matrix(64, 128, "mlp.up_proj"), matrix(64, 64, "self_attn.o_proj")):
        assert torch.allclose(found.read(ours), found.read(theirs), rtol=1e-6)
        assert not found.is_int4(ours)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quantised by 'bitsandbytes', which is not read. Read are awq, compressed_tensors",
        ),
        (AWQ | {"version": "gemv"}, 'version "gemv". Read are 4 bits in version "gemm"'),
        (gptq(bits=3), "has 3 bits"),
        (compressed(True, layout="marlin-24"), "has format marlin-24"),
        (compressed(True, 2), r"packs \[2\] bits"),
    ],
)
def test_what_is_not_read_is_refused(config: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    folder = published.publish(source, tmp_path, config, CASES["awq"]) / "quantized"
    with pytest.raises(CheckpointError, match=message):
        matrix(64, 128, "mlp.up_proj").read(tiny.plan(folder).checkpoint)


def test_scattered_groups_of_different_sizes_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folders("gptq-asymmetric-scattered") / "quantized"
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.down_proj.g_idx"))
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="g_idx does not give every one"):
        matrix(128, 64, "mlp.down_proj").int4(tiny.plan(tmp_path).checkpoint)


def test_nothing_is_calibrated_that_is_quantised_already(folders: Callable[[str], Path], tmp_path: Path) -> None:
    plan = Job(str(folders("awq") / "quantized"), (), "cpu_int4", quantizer="gptq").plan()
    with pytest.raises(UsageError, match="is quantised already"):
        export(plan, tmp_path)
