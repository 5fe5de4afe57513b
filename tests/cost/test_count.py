"""What is counted: against hand computation, the papers' formula, and the weights that an export really writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import exporter.families
from exporter import _discover, methods
from exporter.checkpoint import Checkpoint
from exporter.cost import formulas
from exporter.cost.count import Counting, Load, count
from exporter.cost.work import Work
from exporter.errors import CheckpointError
from exporter.families._contract import Request
from exporter.nn.specs import DecoderSpec
from exporter.plan import Plan, make_plan
from exporter.stages.export import export
from graphs import _spec
from profiles import _schema
from tests.families import tiny

LOAD, MOST = Load(1, 64, 32), Load(1, 512, 256)
FP16, INT4 = "agx_orin_64gb_fp16", "agx_orin_64gb_int4"


def plan_of(family: str, reductions: tuple[str, ...] = (), profile: str = INT4) -> Plan:
    return make_plan(methods.published(family), reductions, _schema.load(profile))


@pytest.fixture(scope="module")
def llava() -> tuple[Plan, Work]:
    plan = plan_of("llava")
    return plan, count(plan, LOAD, MOST)


@pytest.fixture(scope="module")
def pruned() -> tuple[Plan, Work]:
    plan = plan_of("llava", ("visionzip:keep=64", "fastv:layer=2,keep=32"))
    return plan, count(plan, LOAD, MOST)


def spec_of(plan: Plan) -> DecoderSpec:
    spec = plan.family.decoder(plan.checkpoint)
    assert isinstance(spec, DecoderSpec)
    return spec


def test_prefill_is_the_formula_of_the_papers_and_the_head(llava: tuple[Plan, Work]) -> None:
    plan, work = llava
    spec = spec_of(plan)
    assert work.stage("prefill").flops == formulas.prefill_flops(spec, [640] * 32) + 2 * spec.hidden * spec.vocab


def test_decode_sees_the_cache(llava: tuple[Plan, Work]) -> None:
    plan, work = llava
    spec, seen = spec_of(plan), [576 + 64 + 32 + 1] * 32
    assert work.stage("decode").flops == formulas.decode_flops(spec, seen) + 2 * spec.hidden * spec.vocab
    read = sum(op.count * op.moved_bytes for op in work.stage("decode").operators if op.kind == "attention")
    assert 1 <= read / formulas.cache_bytes(spec, seen, 2) < 1.01


def test_the_tower_of_clip(llava: tuple[Plan, Work]) -> None:
    """ViT-L/14 at 336 pixels, 23 blocks of it: 183 GMAC."""
    n, d = 577, 1024
    block = 8 * n * d * d + 4 * n * n * d + 2 * n * d * 4096 * 2
    assert llava[1].stage("vision").flops == 23 * block + 2 * 576 * 3 * 14 * 14 * d


def test_scores_are_told_apart(llava: tuple[Plan, Work]) -> None:
    """Written once and read once by each layer: heads · n² numbers of two bytes."""
    prefill = llava[1].stage("prefill")
    assert sum(op.count * op.score_bytes for op in prefill.operators) == 32 * 2 * (32 * 640 * 640 * 2)
    attention = sum(op.count * op.moved_bytes for op in prefill.operators if op.kind == "attention")
    assert attention == 32 * 4 * 640 * 4096 * 2, "queries, keys, values, and what comes of them"


def test_weights_of_vicuna(llava: tuple[Plan, Work]) -> None:
    """6.48 billion in blocks of 128: four bits each and a scale of two bytes; the head and the norms at two bytes."""
    engine = next(e for e in llava[1].engines if e.name == "llm")
    quantised = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    whole = 4096 * 32064 + 65 * 4096
    assert engine.weight_bytes == quantised // 2 + quantised // 128 * 2 + whole * 2
    assert (engine.largest, engine.largest_bytes) == ("lm_head.weight", 4096 * 32064 * 2)
    assert engine.widest_bytes == 4096 * 12288 * 2, "queries, keys and values are one matrix, wider than the MLP's"


def test_a_reduction_counts_where_it_acts(llava: tuple[Plan, Work], pruned: tuple[Plan, Work]) -> None:
    plan, work = pruned
    spec = spec_of(plan)
    expected = formulas.prefill_flops(spec, [128] * 2 + [96] * 30) + 2 * spec.hidden * spec.vocab
    assert expected < work.stage("prefill").flops < 1.001 * expected, "the method's own products are in it, and small"
    assert work.stage("reduce").flops < llava[1].stage("reduce").flops / 8, "only kept tokens are projected"
    read = sum(op.count * op.moved_bytes for op in work.stage("decode").operators if op.kind == "attention")
    seen = [64 + 64 + 32 + 1] * 2 + [32 + 64 + 32 + 1] * 30
    assert 1 <= read / formulas.cache_bytes(spec, seen, 2) < 1.04


def test_two_engines_hold_the_weights_twice(llava: tuple[Plan, Work], pruned: tuple[Plan, Work]) -> None:
    one = next(e.weight_bytes for e in llava[1].engines if e.name == "llm")
    assert [e.weight_bytes for e in pruned[1].engines if e.name in ("prefill", "decode")] == [one, one]


def test_the_limits_decide_what_is_alive(llava: tuple[Plan, Work]) -> None:
    """Gate and up of one layer, two bytes each, are the widest a decoder has; beside them the hidden state and the mask."""
    engine = next(e for e in llava[1].engines if e.name == "llm")
    tokens = 576 + 512
    assert 2 * tokens * 11008 * 2 < engine.activation_bytes < 4 * (2 * tokens * 11008 * 2)
    wider = count(llava[0], LOAD, replace(MOST, text=1600))
    assert next(e for e in wider.engines if e.name == "llm").activation_bytes > 1.8 * engine.activation_bytes


@pytest.mark.parametrize(
    ("profile", "reductions"),
    [
        (INT4, ("visionzip:keep=8", "fastv:layer=1,keep=4")),
        pytest.param("cpu_fp32", ("visionzip:keep=8", "fastv:layer=1,keep=4"), marks=pytest.mark.slow),
        pytest.param("cpu_int4", (), marks=pytest.mark.slow),
    ],
)
def test_weights_are_those_that_an_export_writes(profile: str, reductions: tuple[str, ...], tmp_path: Path) -> None:
    """Of every graph: bytes of its initializers that are weights, as onnx reads them."""
    tiny.llava(tmp_path / "model")
    plan = tiny.plan(tmp_path / "model", reductions, Request(), profile)
    plan = replace(plan, profile=replace(plan.profile, stack=replace(plan.profile.stack, flavour=None)))
    (tmp_path / "graphs").mkdir()
    graphs = export(plan, tmp_path / "graphs")
    found = {e.name: e.weight_bytes for e in count(plan, Load(1, 8, 4), Load(1, 8, 4)).engines}
    for file, roles in graphs.roles().items():
        model = onnx.load(tmp_path / "graphs" / file, load_external_data=False)
        outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        written = sum(int(next(e.value for e in t.external_data if e.key == "length")) for t in outside)
        assert found["llm" if len(roles) > 1 else roles[0]] == written, file


QUICK = ("smolvlm", "qwen2_5_vl")


@pytest.mark.parametrize(
    "family",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in _discover.names(exporter.families)
    ],
)
def test_config_json_is_enough(family: str, tmp_path: Path) -> None:
    """Nothing of a checkpoint is there but its config: most layers are left out, to be quick."""
    config: dict[str, Any] = json.loads(json.dumps(methods.published(family).config))
    text = config.get("text_config") or config.get("llm_config") or config
    if "num_hidden_layers" in text:
        text["num_hidden_layers"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = make_plan(Checkpoint(tmp_path), (), _schema.load(INT4))
    work = count(plan, Load(1, 8, 4), Load(1, 8, 4))
    spec = plan.family.decoder(plan.checkpoint)
    least = 2 * (8 + plan.kept) * spec.layers * 3 * spec.hidden * spec.intermediate
    assert least < work.stage("prefill").flops < 4 * least
    assert work.stage("vision").flops > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", _spec.names())
def test_every_reduction_is_counted(name: str) -> None:
    """At half of the tokens, on the first published model that it fits."""
    family = methods.families(name)[0]
    plan = methods.fit(name, methods.published(family)).plan
    assert plan is not None
    work = count(plan, Load(1, 16, 8), Load(1, 16, 8))
    assert all(stage.flops > 0 for stage in work.stages if stage.name != "reduce")


def test_a_model_without_a_family_needs_its_weights(tmp_path: Path) -> None:
    tiny.aya_vision(tmp_path)
    plan = tiny.plan(tmp_path, (), Request(), "cpu_fp32")
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no model"):
        count(plan, Load(1, 8, 4), Load(1, 8, 4))


def test_what_is_gone_was_there_whatever_has_its_place() -> None:
    """A product of 8 · 1024 numbers is dropped, and one of many outputs gets its address."""
    module = torch.nn.ParameterDict({n: torch.empty(*size, device="meta") for n, size in (("up", (8, 1024)), ("down", (1024, 8)), ("same", (8, 8)))})  # fmt: skip
    counting = Counting(module, _schema.load("cpu_fp32").precision, torch.float32)
    x = torch.empty(8, 8, device="meta")
    with torch.no_grad(), counting:
        wide = x @ module["up"]
        narrow = wide @ module["down"]
        del wide
        outputs = [narrow @ module["same"] for _ in range(64)]
    assert {counting.peak(out) for out in outputs} == {(8 * 1024 + 8 * 8) * 4}
