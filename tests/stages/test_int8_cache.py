"""An INT8 cache: its numbers by hand, its graphs in ONNX Runtime against PyTorch with the same rounding, and against the float model
whose cache NumPy rounds between the steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch

from exporter.backends.ort import OnnxRuntime
from exporter.cost.count import Load, count
from exporter.job import Job
from exporter.nn.cache import LARGEST, SMALLEST, Dequantize, Quantize
from exporter.pipeline import run_build, run_export
from exporter.runtime.generate import Generator, embedding
from exporter.stages._modules import load_reference
from exporter.stages._reference import reference
from exporter.stages.build import shape_profile
from exporter.stages.export import export
from exporter.workspace import Workspace
from profiles import _schema
from tests.conftest import for_one_gpu, needs_rtx
from tests.families import tiny
from tests.graphs.oracle_glimpse import New
from tests.stages.conftest import SIZES, Engine, Export, Exported, objections, plain

STEPS = 24
CHAINS = [
    pytest.param("qwen2_5_vl", (), id="qwen2_5_vl"),
    pytest.param("llava", ("visionzip:keep=12", "fastv:layer=2,keep=6"), id="two-groups"),
    pytest.param("llava", ("mustdrop:keep=13,window=2", "mustdrop_l:layer_list=2+3,keep=5"), id="in-stages"),
    pytest.param("llava", ("lookm:keep=6,mode=average",), id="merged-per-head"),
    pytest.param("llava", ("sparsemm:keep=6",), id="ragged-per-head", marks=pytest.mark.slow),
    pytest.param("llava", ("dyrate:layer=2,keep=12,step_list=3+20,keep_list=7+2",), id="while-decoding"),
]


def rounded(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Every vector of the last axis, rounded to 127 steps of either sign of its largest magnitude."""
    wide = x.astype(np.float64)
    step = np.maximum(np.abs(wide).max(-1, keepdims=True) / 127, 2.0**-14)
    found: npt.NDArray[Any] = (np.rint(wide / step) * step).astype(x.dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_token_is_rounded_when_it_comes_and_never_again(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 9, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 1, 8], x[1, 0, 2] = 0, 60000
    first, before = Quantize()(x[:, :, :5], None)
    assert (first.dtype, before.dtype, before.shape) == (torch.int8, dtype, (2, 3, 5, 1))
    changed = x.clone()
    changed[:, :, :5] = 7  # what is in the cache is not read from the floats
    whole, scale = Quantize()(changed, first)
    assert torch.equal(whole[:, :, :5], first)
    found = Dequantize()(whole, torch.cat([before, scale], 2))
    assert found.dtype == dtype
    most = x.float().abs().amax(-1, keepdim=True)
    float16 = 0 if dtype == torch.float32 else 2.0**-10  # the scale and the product are
    assert ((found.float() - x.float()).abs() <= most * (0.5 / 127 + float16 + 1e-6)).all()
    if dtype == torch.float32:
        torch.testing.assert_close(found, torch.from_numpy(rounded(x.numpy())))
    assert torch.equal(found[0, 1, 8], torch.zeros(16, dtype=dtype))
    assert whole.min() >= -LARGEST
    assert np.finfo(np.float16).smallest_normal == SMALLEST


def with_same_rounding(case: Exported) -> Generator:
    runners, graphs, table = reference(case.plan, load_reference(case.plan))
    return Generator(runners, tiny.endless(graphs), table)


@pytest.mark.parametrize(("family", "reductions"), CHAINS)
def test_onnx_runtime_equals_pytorch(
    family: str, reductions: tuple[str, ...], exported: Export, engine: Engine
) -> None:
    case = exported(family, reductions, kv="int8")
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 1, (20, 21, 22, 23, 24))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    ours, theirs = engine(case), with_same_rounding(case)
    mine, other = ours.generate(pixels, prompts, STEPS), theirs.generate(pixels, prompts, STEPS)
    assert mine.tokens == other.tokens
    assert {v.split("_")[1] for v in mine.cache.past} >= {"key", "value", "scale", "order"}
    for name, value in mine.cache.past.items():
        a, b = ours._decode.numpy(value), theirs._decode.numpy(other.cache.past[name])
        if name.startswith(("past_key_", "past_value_")):
            assert a.dtype == np.int8
            # A tie is broken by the last bit of a float, and what comes behind reads the one or the other.
            assert (a != b).mean() < 2e-2
            b = a if np.abs(a.astype(int) - b).max() <= 1 else b
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("family", "reductions"), CHAINS[:3])
def test_it_is_the_float_model_whose_cache_is_rounded(
    family: str, reductions: tuple[str, ...], exported: Export, engine: Engine
) -> None:
    case = exported(family, reductions, kv="int8")
    asked = tiny.question(case.graphs, 3)
    ours, theirs = engine(case), case.theirs()
    visual = theirs.reduce(theirs.vision(asked.pixels))
    mine, other = ours.prefill(visual, [asked.prompt]), theirs.prefill(visual, [asked.prompt])
    np.testing.assert_allclose(mine.logits, other.logits, atol=1e-4)  # a prompt does not see what it leaves
    differs = 0.0
    exact = {name: value.clone() for name, value in other.cache.past.items()}
    for token in range(11, 17):
        for name, value in other.cache.past.items():
            if name.startswith(("past_key_", "past_value_")):
                other.cache.past[name] = torch.from_numpy(rounded(value.numpy()))
        one, two = ours.step(mine.cache, np.array([token])), theirs.step(other.cache, np.array([token]))
        np.testing.assert_allclose(one, two, atol=2e-3)  # 1e-5, but where a tie was broken otherwise
        unrounded = theirs._decode.run({**feeds(theirs, exact, token, other.cache), **exact})
        differs = max(differs, float(np.abs(unrounded["logits"].numpy() - two).max()))
        break_at = {k: "present" + k[4:] for k in exact}
        exact = {k: unrounded[name] for k, name in break_at.items()}
    assert differs > 2e-2, "a cache in floats would have passed as well"


def feeds(generator: Generator, past: dict[str, Any], token: int, cache: Any) -> dict[str, Any]:
    """Of the step that was just made."""
    back = type(cache)(past, cache.next_position - 1, cache.next_order - 1, [[]])
    words = generator._words(np.array([[token]]), *back.places(np.ones((1, 1), np.bool_)))
    return generator._feeds(generator._decode, words)


def test_a_probe_leaves_with_its_scale(
    checkpoints: dict[str, Path], tmp_path: Path, exported: Export, engine: Engine
) -> None:
    file = New(64, 4, 4, 48, 2).randomized().save(tmp_path / "weights.safetensors")
    case = exported("llava", (f"glimpse:weights={file},keep=6,layer=2,scores=log_softmax",), kv="int8")
    asked = tiny.question(case.graphs)
    ours, theirs = engine(case), with_same_rounding(case)
    mine, other = (g.generate(asked.pixels, [asked.prompt], STEPS) for g in (ours, theirs))
    assert mine.tokens == other.tokens
    scale = ours._decode.numpy(mine.cache.past["past_scale_0"])
    np.testing.assert_allclose(scale, other.cache.past["past_scale_0"].numpy(), rtol=1e-3)


def test_a_traced_model(tmp_path: Path, engine: Engine) -> None:
    """Whose layers are transformers'."""
    tiny.aya_vision(tmp_path / "model")
    plan = plain(tiny.plan(tmp_path / "model", ("uniform:keep=4",)))
    folders = {}
    for kv in ("none", "int8"):
        made = replace(plan, profile=_schema.with_kv(plan.profile, kv))  # type: ignore[arg-type]
        (tmp_path / kv).mkdir()
        folders[kv] = Exported(made, tmp_path / kv, export(made, tmp_path / kv))
    asked = tiny.question(folders["none"].graphs)
    floats, int8 = engine(folders["none"]), engine(folders["int8"])
    visual = floats.reduce(floats.vision(asked.pixels))
    one, two = floats.prefill(visual, [asked.prompt]), int8.prefill(visual, [asked.prompt])
    np.testing.assert_allclose(one.logits, two.logits, atol=1e-4)
    for name, value in one.cache.past.items():
        if name.startswith(("past_key_", "past_value_")):
            one.cache.past[name] = rounded(floats._decode.numpy(value))
    np.testing.assert_allclose(floats.step(one.cache, np.array([11])), int8.step(two.cache, np.array([11])), atol=2e-4)


def test_rows_of_a_cache_can_be_taken(exported: Export, engine: Engine) -> None:
    """As beams and conversations that branch take them."""
    case = exported("llava", ("visionzip:keep=12", "fastv:layer=2,keep=6"), kv="int8")
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 1)]
    ours = engine(case)
    visual = ours.reduce(ours.vision(np.concatenate([q.pixels for q in asked])))
    cache = ours.prefill(visual, [q.prompt for q in asked]).cache
    swapped = ours.rows(cache, np.array([1, 0, 1]))
    one, two = ours.step(cache, np.array([11, 12])), ours.step(swapped, np.array([12, 11, 12]))
    np.testing.assert_allclose(two, one[[1, 0, 1]], atol=1e-5)


def test_what_is_stored_is_what_the_estimate_says(exported: Export, engine: Engine) -> None:
    for kv in ("none", "int8"):
        case = exported("llava", ("visionzip:keep=12", "fastv:layer=2,keep=6"), kv=kv)
        asked = tiny.question(case.graphs)
        ours = engine(case)
        found = ours.generate(asked.pixels, [asked.prompt], 9).cache.past
        held = {name: ours._decode.numpy(value).nbytes for name, value in found.items()}
        text = found["past_order_0"].shape()[1] - case.graphs.text.kept[0]
        work = count(case.plan, Load(1, 8, 8), Load(1, text, 0))
        assert sorted(work.cache) == sorted(held.values())


def test_a_step_reads_the_integers(checkpoints: dict[str, Path]) -> None:
    """By hand: a layer's attention reads its queries and writes its outcome, and reads keys and values: new ones as floats, past ones as
    a byte each and a scale per token and head."""
    plan = tiny.plan(checkpoints["llava"], ("uniform:keep=8",))
    text = plan.geometry
    moved = {}
    for kv in ("none", "int8"):
        made = replace(plan, profile=_schema.with_kv(plan.profile, kv))  # type: ignore[arg-type]
        operators = count(made, Load(1, 20, 12), Load(1, 20, 12)).stage("decode").operators
        moved[kv] = sum(op.count * op.moved_bytes for op in operators if op.kind == "attention")
    past = 8 + 20 + 12
    assert moved["none"] - moved["int8"] == text.layers * 2 * text.kv_heads * past * (text.head_dim * 3 - 4)


@needs_rtx
@pytest.mark.parametrize("profile", ["rtx_fp16", "rtx_int4"])
def test_tensorrt_rtx_builds_it(profile: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    reductions = ("dyrate:layer=2,keep=12,step_list=3,keep_list=7",) if profile == "rtx_fp16" else ("lookm:keep=6",)
    run_export(Job(str(checkpoints["llava"]), reductions, for_one_gpu(profile, tmp_path), kv="int8"), work)
    for graph in work.graphs.glob("*.onnx"):
        assert not objections(graph)
    records = run_build(work)
    decode = next(r for r in records if "decode" in r.roles)
    kinds = {name: found["dtype"] for name, found in decode.details["inputs"].items()}
    assert {kinds["past_key_0"], kinds["past_value_3"]} == {"INT8"}
    assert kinds["past_scale_0"] == "HALF"


def test_its_flavour_says_why_it_stays_plain(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    graphs = run_export(Job(str(checkpoints["llava"]), (), "cpu_int4", kv="int8"), Workspace(tmp_path), said.append)
    assert graphs.files["decode"] == "decode.onnx"
    assert any("flavour ort does not take these graphs, they stay plain: keys and values are INT8" in s for s in said)
    model = ir.load(tmp_path / "graphs" / "decode.onnx")
    shapes = {
        v.name: [d if isinstance(d, int) else 0 for d in v.shape]
        for v in model.graph.inputs
        if v.shape is not None and (v.name or "").startswith("past_")
    }
    asked = shape_profile("prefill", graphs, _schema.load("cpu_int4").limits).inputs
    assert {name: list(asked[name][1:]) for name in shapes} == {name: shape[1:] for name, shape in shapes.items()}
    runner = OnnxRuntime(threads=1).runner(tmp_path / "graphs" / "decode.onnx")
    with runner:
        assert runner.inputs["past_key_0"] == np.int8
    assert embedding(tmp_path / "graphs", graphs).shape[1] == graphs.text.hidden
    assert SIZES["llava"] is None
