"""The flavour of newer ONNX operators: the plain graphs' results, in ONNX Runtime, and taken by the parsers that it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporter.backends.ort import OnnxRuntime
from exporter.families._contract import Request
from exporter.flavours import _apply
from exporter.flavours._contract import Refused
from exporter.flavours._plain import core
from exporter.flavours.ops23 import FLAVOUR
from exporter.graphset import GraphSet
from exporter.lint import _table
from exporter.lint._check import lint
from exporter.runtime.generate import Generator, embedding
from exporter.stages.build import build
from exporter.stages.export import export
from profiles import _schema
from tests.conftest import needs_rtx
from tests.families import tiny

CASES: list[tuple[str, tuple[str, ...], tuple[int, int] | None]] = [
    ("llava", ("fastv:layer=1,keep=3",), None),
    ("qwen2_5_vl", (), (140, 112)),
]
"""A prefill graph of its own, with nodes that look at queries and keys; M-RoPE and biases."""
FIRST_AND_SLOW = [CASES[0], pytest.param(CASES[1], marks=pytest.mark.slow)]


@dataclass(frozen=True)
class Flavoured:
    folder: Path
    plain: GraphSet
    graphs: GraphSet


@pytest.fixture(scope="module")
def flavoured(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Flavoured]:
    """flavoured(family, reductions, size): float16 graphs, plain and rewritten, once."""
    done: dict[str, Flavoured] = {}

    def run(family: str, reductions: tuple[str, ...], size: tuple[int, int] | None) -> Flavoured:
        if family not in done:
            checkpoint, folder = tmp_path_factory.mktemp(family), tmp_path_factory.mktemp("graphs")
            getattr(tiny, family)(checkpoint)
            plain = export(tiny.plan(checkpoint, reductions, Request(1, size), "rtx_fp16"), folder)
            told: list[str] = []
            files = _apply.apply("ops23", "trt", folder, plain.files, told.append)
            assert told == []
            done[family] = Flavoured(folder, plain, replace(plain, files={**plain.files, **files}))
        return done[family]

    return run


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph)


@pytest.mark.parametrize("case", FIRST_AND_SLOW, ids=lambda c: c[0])
def test_one_node_each(flavoured: Any, case: Any) -> None:
    found = flavoured(*case)
    layers = found.graphs.text.layers
    for role in ("prefill", "decode"):
        path = found.folder / found.graphs.files[role]
        assert path.name.endswith(".ops23.onnx")
        kinds = operators(path)
        assert (kinds["Attention"], kinds["RotaryEmbedding"], kinds["RMSNormalization"]) == (
            layers,
            2 * layers,
            2 * layers + 1,
        )
        assert kinds["Pow"] == 0
        if role == "decode":
            assert kinds["Softmax"] == 0
        onnx.checker.check_model(path, full_check=True)
        assert not operators(found.folder / found.plain.files[role])["Attention"], "the graph of record stays plain"


@pytest.mark.parametrize("case", FIRST_AND_SLOW, ids=lambda c: c[0])
def test_as_the_plain_graphs(flavoured: Any, case: Any) -> None:
    """Two prompts of different length, the shorter one padded, and steps behind them. In float16 both round, but not alike."""
    found = flavoured(*case)
    asked = [tiny.question(found.graphs, 0, (11, 12, 13)), tiny.question(found.graphs, 1, (14, 15, 16, 17, 18, 19))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    seen = []
    for graphs in (found.plain, found.graphs):
        runners = {}
        for file, roles in graphs.roles().items():
            runners |= dict.fromkeys(roles, OnnxRuntime(threads=1).runner(found.folder / file).__enter__())
        g = Generator(runners, tiny.endless(graphs), embedding(found.folder, graphs))
        prefilled = g.prefill(g.reduce(g.vision(pixels)), prompts)
        steps = [g.step(prefilled.cache, np.array([token, token + 1])) for token in (21, 31, 41)]
        seen.append((prefilled.kept, [prefilled.logits, *steps]))
    (kept, plain), (same, ours) = seen
    assert kept.keys() == same.keys()
    assert all(np.array_equal(kept[name], same[name]) for name in kept)
    for a, b in zip(ours, plain, strict=True):
        assert np.abs(a - b).max() <= 1e-2 * np.abs(b).max()


def test_who_takes_it(flavoured: Any) -> None:
    """As the tables say; TensorRT 10.3 knows none of the three."""
    found = flavoured(*CASES[0])
    for name in _table.names():
        findings = lint(found.folder / found.graphs.files["decode"], _table.load(name))
        refused = {f.op for f in findings if f.fatal}
        assert refused == (
            {"Attention", "RotaryEmbedding", "RMSNormalization"} if name == "tensorrt-10.3" else set()
        ), name


@needs_rtx
def test_tensorrt_rtx_builds_it(flavoured: Any, tmp_path: Path) -> None:
    found = flavoured(*CASES[0])
    files = {role: found.graphs.files[role] for role in ("prefill", "decode")}
    records = build(replace(found.graphs, files=files), found.folder, tmp_path, _schema.load("rtx_fp16"))
    assert {record.file for record in records} == {"prefill.ops23.engine", "decode.ops23.engine"}


@pytest.mark.parametrize(
    ("change", "reason"), [("type", "it is for float16 graphs"), ("mask", "one mask for all heads")]
)
def test_refused_with_a_reason(flavoured: Any, change: str, reason: str) -> None:
    """Float32, and masks of their own for KV heads that keep tokens of their own."""
    found = flavoured(*CASES[0])
    model = ir.load(found.folder / found.plain.files["decode"])
    cores = [c for c in map(core, (n for n in model.graph if n.op_type == "Softmax")) if c is not None]
    assert len(cores) == found.plain.text.layers
    for c in cores:
        if change == "type":
            c.q.dtype = ir.DataType.FLOAT
        else:
            c.mask.shape = ir.Shape(["batch", 2, "seq", "total"])
    with pytest.raises(Refused, match=reason):
        FLAVOUR.rewrite(model)
