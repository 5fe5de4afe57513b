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
from tests.packings.published import GROUP, Nested, Rounded
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


def modelopt(algorithm: str, **config: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "producer": {"name": "modelopt"}} | config


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
        assert source.numbers(ours) == ("int4" if name in CASES else None)
        assert source.bytes(ours) < source.bytes(theirs) / (2 if name in CASES else 1)


@pytest.mark.parametrize("name", CASES)
def test_integers_and_scales_are_the_published_ones(name: str, folders: Callable[[str], Path]) -> None:
    case, (_, ours) = CASES[name], both(folders(name))
    names = sorted(load_file(folders(name) / "plain/model.safetensors"))
    found = matrix(128, 64, "mlp.down_proj").quantized(ours)
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
    assert torch.allclose(whole.quantized(ours).dequantized(), whole.read(theirs), rtol=1e-6, atol=1e-7)


def test_smaller_blocks_are_the_same_matrix(folders: Callable[[str], Path]) -> None:
    _, ours = both(folders("awq"))
    found = matrix(128, 64, "mlp.down_proj").quantized(ours)
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
def test_eight_bits_are_read(kind: str, config: dict[str, Any], source: Path, tmp_path: Path) -> None:
    theirs, ours = both(published.publish(source, tmp_path, config, floats(kind)))
    for found in (matrix(64, 128, "mlp.up_proj"), matrix(64, 64, "self_attn.o_proj")):
        assert torch.allclose(found.read(ours), found.read(theirs), rtol=1e-6)
        assert found.numbers(ours) == {"int": "int8", "float": "fp8", "fp8": None}[kind]


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
        (modelopt("NVFP4_AWQ"), "quantised by NVFP4_AWQ. Read are NVFP4, W4A16_NVFP4, FP8"),
        (
            modelopt(
                "MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "W4A16_AWQ"}}
            ),
            "quantised by W4A16_AWQ",
        ),
    ],
)
def test_what_is_not_read_is_refused(config: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    folder = published.publish(source, tmp_path, config, CASES["awq"]) / "quantized"
    with pytest.raises(CheckpointError, match=message):
        matrix(64, 128, "mlp.up_proj").read(tiny.plan(folder).checkpoint)


NESTED: dict[str, tuple[dict[str, Any], Callable[[Nested], dict[str, torch.Tensor]]]] = {
    "modelopt": (modelopt("NVFP4", kv_cache_scheme={"num_bits": 8}), published.modelopt),
    "compressed-tensors": (compressed(True, 4, "nvfp4-pack-quantized", group_size=16), published.nvfp4_packed),
}


def nested(shape: tuple[int, int], seed: int) -> Nested:
    """With one scale for all matrices, as those side by side have; a power of two, whose inverse is exact."""
    return published.nested(shape, seed)._replace(whole=np.float32(2**-13))


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def wholes(folder: Path) -> Checkpoint:
    return tiny.plan(folder, profile="rtx_5090_nvfp4").checkpoint


@pytest.mark.parametrize("name", NESTED)
def test_nvfp4_stays_what_was_published(name: str, source: Path, tmp_path: Path) -> None:
    """Read as the floats it stands for; in a graph of a profile with NVFP4 bit by bit, but that a block of scale zero is zeros."""
    config, pack = NESTED[name]

    def both_ways(shape: tuple[int, int], seed: int) -> Packed:
        return pack(nested(shape, seed)), nested(shape, seed).dequantized()

    folder = published.publish(source, tmp_path / "published", config, both_ways)
    theirs, ours = both(folder)
    for found in (matrix(64, 128, "mlp.gate_proj"), matrix(64, 32, "self_attn.v_proj")):
        assert torch.equal(found.read(ours), found.read(theirs))
        assert found.numbers(ours) == "fp4"
    graphs = export(tiny.plan(folder / "quantized", profile="rtx_5090_nvfp4"), out := empty(tmp_path / "graphs"))
    assert graphs.lookup
    model = onnx.load(out / "decode.onnx")
    stored = {t.name: t for t in model.graph.initializer}
    number = sorted(load_file(folder / "plain/model.safetensors")).index(
        next(n for n in load_file(folder / "plain/model.safetensors") if n.endswith("layers.1.mlp.down_proj.weight"))
    )
    expected, label = nested((64, 128), number), "layers.1.mlp.down_proj.weight"
    codes, scale = expected.codes.copy(), expected.scale.copy()
    codes[1, 16:32], scale[1, 1] = 0, 1  # 2^-9, the smallest
    assert stored[f"{label}.fp4"].raw_data == (codes.T[:, 0::2] | codes.T[:, 1::2] << 4).tobytes()
    assert stored[f"{label}.scale"].raw_data == scale.T.tobytes()
    assert onnx.numpy_helper.to_array(stored[f"{label}.whole"]) == expected.whole
    assert json.loads((out / "precision.json").read_text())["quantizer"] == "the checkpoint's"


def test_modelopt_beside_config_json_and_of_both_types(source: Path, tmp_path: Path) -> None:
    """Older checkpoints tell in a file of its own only; of mixed precision each matrix tells what it is."""

    def pack(shape: tuple[int, int], seed: int) -> Packed:
        if seed % 2:
            return published.modelopt(published.nested(shape, seed)), published.nested(shape, seed).dequantized()
        weight = torch.randn(shape, generator=torch.manual_seed(seed)).to(torch.float8_e4m3fn)
        return {"weight": weight, "weight_scale": torch.tensor(0.01)}, weight.float() * 0.01

    layers = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}}
    folder = published.publish(source, tmp_path, {}, pack)
    told = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": layers}
    described = {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": told}
    (folder / "quantized/hf_quant_config.json").write_text(json.dumps(described))
    theirs, ours = both(folder)
    names = ("mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj")
    found = [matrix(64, 128 if "mlp" in name else 64, name) for name in names]
    assert all(torch.allclose(m.read(ours), m.read(theirs), rtol=1e-6) for m in found)
    assert {m.numbers(ours) for m in found} == {"fp4", "fp8"}


@pytest.mark.parametrize(("kind", "profile", "suffix"), [("int", "cpu_int8", "int8"), ("float", "rtx_4090_fp8", "fp8")])
def test_eight_bits_stay_what_was_published(kind: str, profile: str, suffix: str, source: Path, tmp_path: Path) -> None:
    """With a scale per channel byte by byte; one for the whole matrix stands in every channel."""
    config = compressed(True, 8, f"{kind}-quantized", strategy="channel", type=kind)

    def pack(shape: tuple[int, int], seed: int) -> Packed:
        parts, weight = floats(kind)(shape, seed)
        parts["weight_scale"] = parts["weight_scale"].half().float()  # that of the graph
        if shape == (64, 128):  # down
            parts["weight_scale"] = parts["weight_scale"].amax().reshape(1)
        else:
            parts["weight_scale"][3] = 0  # of a channel that is nothing
        return parts, weight

    folder = published.publish(source, tmp_path / "published", config, pack)
    export(plain(tiny.plan(folder / "quantized", profile=profile)), out := empty(tmp_path / "graphs"))
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out / "decode.onnx").graph.initializer}
    theirs = load_file(folder / "quantized/model.safetensors")
    for name in ("mlp.down_proj", "mlp.up_proj"):
        of = {
            key.rpartition(".")[2]: t for key, t in theirs.items() if f"layers.1.{name}." in key and "language" in key
        }
        label, numbers, scale = f"layers.1.{name}.weight", of["weight"].view(torch.uint8), of["weight_scale"].ravel()
        if len(scale) > 1:
            numbers[3], scale[3] = 0, 1
        assert stored[f"{label}.{suffix}"].tobytes() == numbers.t().contiguous().numpy().tobytes()
        assert np.array_equal(stored[f"{label}.scale"], scale.expand(len(numbers)).numpy())


def test_matrices_side_by_side_share_their_scale(source: Path, tmp_path: Path) -> None:
    def pack(shape: tuple[int, int], seed: int) -> Packed:
        found = published.nested(shape, seed)
        found = found._replace(whole=found.whole * np.float32(1 + seed))
        return published.modelopt(found), found.dequantized()

    folder = published.publish(source, tmp_path / "published", modelopt("NVFP4"), pack)
    with pytest.raises(CheckpointError, match=r"q_proj.*read the same input, but differ in"):
        export(tiny.plan(folder / "quantized", profile="rtx_5090_nvfp4"), empty(tmp_path / "graphs"))


@pytest.mark.parametrize("damage", ["scale of a type", "a scale", "scale of all"])
def test_nvfp4_that_is_none_is_refused(damage: str, source: Path, tmp_path: Path) -> None:
    def pack(shape: tuple[int, int], seed: int) -> Packed:
        parts = published.modelopt(published.nested(shape, seed))
        if damage == "scale of a type":
            parts["weight_scale"] = parts["weight_scale"].float()
        elif damage == "a scale":
            parts["weight_scale"][0, 0] = -parts["weight_scale"][0, 0].float()
        else:
            parts["weight_scale_2"] = torch.tensor(float("nan"))
        return parts, torch.zeros(shape)

    folder = published.publish(source, tmp_path, modelopt("NVFP4"), pack)
    with pytest.raises(CheckpointError, match="NVFP4"):
        matrix(64, 128, "mlp.up_proj").read(wholes(folder / "quantized"))


@pytest.mark.parametrize(
    "config",
    [
        compressed(True) | {"config_groups": [1]},
        compressed(True) | {"config_groups": {"group_0": {"weights": {"num_bits": "four"}}}},
        gptq(bits="four"),
        AWQ | {"bits": []},
        modelopt("MIXED_PRECISION", quantized_layers={"a": "FP8"}),
        modelopt("NVFP4", quantization=7),
    ],
)
def test_a_description_that_is_none_is_told(config: dict[str, Any], source: Path, tmp_path: Path) -> None:
    described = json.loads((source / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="quantised it cannot be read"):
        Checkpoint(tmp_path).quantized  # noqa: B018


def test_scattered_groups_of_different_sizes_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folders("gptq-asymmetric-scattered") / "quantized"
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.down_proj.g_idx"))
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="g_idx does not give every one"):
        matrix(128, 64, "mlp.down_proj").quantized(tiny.plan(tmp_path).checkpoint)


def test_nothing_is_calibrated_that_is_quantised_already(folders: Callable[[str], Path], tmp_path: Path) -> None:
    plan = Job(str(folders("awq") / "quantized"), (), "cpu_int4", quantizer="gptq").plan()
    with pytest.raises(UsageError, match="is quantised already"):
        export(plan, tmp_path)
