"""Matrices in blocks of columns: the same numbers, and no piece larger than the device allocates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from exporter.journal import Journal
from exporter.plan import Plan
from exporter.stages._llm import draw_llm
from exporter.stages._modules import build_modules, origins
from exporter.stages._split import blocks_of_columns
from exporter.stages._store import WeightFile
from exporter.stages.export import export
from exporter.weights import Source
from tests.families import tiny
from tests.stages.conftest import Engine, Exported, plain

MIB = 1 << 20


@pytest.mark.parametrize(
    ("shape", "bits", "largest_mib", "widths"),
    [
        ((2048, 257_152), 16, 950, [128_640, 128_512]),  # 1004.5 MiB: a head of Gemma's vocabulary
        ((2048, 257_152), 4, 950, [257_152]),
        ((4096, 152_064), 16, 400, [50_688, 50_688, 50_688]),  # 1188 MiB
        ((64, 300), 32, 1, [300]),
    ],
)
def test_blocks(shape: tuple[int, int], bits: int, largest_mib: int, widths: list[int]) -> None:
    blocks = blocks_of_columns(Source("head.weight", shape, True), bits, largest_mib * MIB)
    assert [block.shape for block in blocks] == [(shape[0], width) for width in widths]
    assert all(shape[0] * width * bits / 8 <= largest_mib * MIB for width in widths)
    assert [block.start for block in blocks] == [sum(widths[:i]) for i in range(len(widths))]
    assert blocks[-1].stop == shape[1]


def limited(plan: Plan, largest_mib: int) -> Plan:
    memory = replace(plan.profile.memory, largest_block_mib=largest_mib)
    device = replace(plan.profile.device, memory=memory)
    return replace(plan, profile=replace(plan.profile, device=device))


def test_a_large_head_is_split(tmp_path: Path, engine: Engine) -> None:
    """5000 tokens of 64 float32 are more than one MiB; in the checkpoint they are those of the embedding."""
    tiny.llava(tmp_path, tied=True, vocab_size=5000)
    whole = plain(tiny.plan(tmp_path, ("fastv:layer=1,keep=4",)))  # prefill and decode: two graphs, one weight file
    found = {}
    for name, plan in (("whole", whole), ("split", limited(whole, 1))):
        (tmp_path / name).mkdir()
        found[name] = Exported(plan, tmp_path / name, export(plan, tmp_path / name))
    for file in ("prefill.onnx", "decode.onnx"):
        sizes = {n: v.const_value for n, v in ir.load(tmp_path / "split" / file).graph.initializers.items()}
        assert {n for n in sizes if "lm_head" in n} == {"lm_head.weight.columns_0", "lm_head.weight.columns_2560"}
        assert max(t.nbytes for t in sizes.values() if t is not None) <= MIB
    same = [(tmp_path / name / "llm.data").stat().st_size for name in found]
    assert abs(same[0] - same[1]) <= 2 * 4096, "nothing is written twice"
    asked = tiny.question(found["whole"].graphs)
    runs = [engine(found[name]) for name in ("whole", "split")]
    logits = [g.prefill(g.reduce(g.vision(asked.pixels)), [asked.prompt]).logits for g in runs]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-6)
    tokens = [g.generate(asked.pixels, [asked.prompt], 8).tokens for g in runs]
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_quantised_matrices_are_split_too(tmp_path: Path, engine: Engine) -> None:
    """Every column has scales of its own, so each block is quantised as the whole is. 64 × 256 in four bits are 8192 bytes."""
    tiny.llava(tmp_path, intermediate_size=256)
    plan = plain(tiny.plan(tmp_path, (), profile="cpu_int4"))
    graphs = export(plan, folder := made(tmp_path / "whole"))
    whole = Exported(plan, folder, graphs)
    modules = build_modules(plan)
    model = draw_llm(plan, modules.decode, torch.float32)
    folder = made(tmp_path / "split")
    for file in whole.folder.iterdir():
        if file.name not in ("decode.onnx", "llm.data"):
            (folder / file.name).symlink_to(file)
    journal = Journal(made(tmp_path / "weights"), {})
    known = origins(plan, modules)["llm"]
    data, blocks = tmp_path / "weights" / "llm.data", plan.profile.precision.blocks
    with WeightFile(data, journal, plan.checkpoint, known, torch.float32, blocks, largest=6000) as weights:
        weights.attach(model)
        ir.save(model, tmp_path / "weights" / "decode.onnx")
    for name in ("decode.onnx", "llm.data"):
        (folder / name).symlink_to(tmp_path / "weights" / name)
    kinds = [n.op_type for n in model.graph if n.op_type == "DequantizeLinear"]
    assert len(kinds) > sum(n.op_type == "DequantizeLinear" for n in ir.load(whole.folder / "decode.onnx").graph)
    asked = tiny.question(graphs)
    logits = []
    for place in (whole, Exported(plan, folder, graphs)):
        g = engine(place)
        logits.append(g.prefill(g.reduce(g.vision(asked.pixels)), [asked.prompt]).logits)
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder
