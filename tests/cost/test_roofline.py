"""Work against a profile: by hand, against what engines were measured to take, and in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter import methods
from exporter.checkpoint import Checkpoint
from exporter.cost.roofline import Use, against, estimate, foresee, pieces
from exporter.cost.work import Engine, Operator, Stage, Work
from exporter.errors import EnvironmentMismatch, UsageError
from exporter.plan import Plan, make_plan
from profiles import _schema

NANO = "orin_nano_8gb_int4"


def plan_of(family: str, reductions: tuple[str, ...] = (), profile: str = NANO) -> Plan:
    return make_plan(methods.published(family), reductions, _schema.load(profile))


WORK = Work(
    (
        Stage("vision", (Operator("convolution", 167 * 10**9, 10**6, 10**6, 0), Operator("matrix", 0, 0, 51 * 10**6, 7))),
        Stage("reduce", ()),
        Stage("prefill", (Operator("matrix", 167 * 10**8, 102 * 10**6, 0, 10**9, 4),)),
        Stage("decode", (Operator("attention", 1, 0, 102 * 10**6, 10**9),)),
    ),
    (Engine("vision", ("vision",), 2**30, 2**20, "patch", 2**20),
     Engine("llm", ("prefill", "decode"), 2 * 2**30, 2**20, "lm_head.weight", 951 * 2**20)),
    (10 * 2**20, 10 * 2**20 + 1, 3),
)  # fmt: skip


def test_by_hand() -> None:
    """16.7 TFLOPS, 102 GB/s and 25 W. Vision: 10 ms of operations, then 0.5 ms of bytes. Prefill: four times the longer of 1 ms of
    operations and 1 ms of bytes; decode: 1 ms of bytes. Scores are fused."""
    found = against(plan_of("llava"), WORK, Use(64, 11))
    vision, prefill, decode = found.stages
    assert (vision.compute_ms, vision.memory_ms, vision.ms) == pytest.approx((10, 53 / 102, 10.5))
    assert (vision.bound, decode.bound) == ("compute", "memory")
    assert (prefill.compute_ms, prefill.memory_ms, prefill.ms) == pytest.approx((4, 4, 4))
    assert (decode.ms, decode.moved_bytes) == (pytest.approx(1), 102 * 10**6)
    assert found.first_token_ms == pytest.approx(14.5)
    assert found.answer_ms == pytest.approx(14.5 + 10), "prefill gives the first of the eleven"
    assert found.answer_j == pytest.approx(24.5e-3 * 25)
    assert [e.build_bytes for e in found.engines] == [int(3.5 * 2**30), 10 * 2**30]
    assert found.cache_bytes == 20 * 2**20 + 4
    assert found.held_bytes == 3 * (10 * 2**20 + 11 * 2**20 + 256), (
        "two of the pool's buffers each, eight sizes per doubling, and one more of each of the three sizes"
    )
    assert found.need_bytes == 3 * 2**30 + 2 * 2**20 + found.held_bytes
    assert found.have_bytes == 7619 * 2**20
    assert found.largest.pieces == 2
    assert found.fits


def test_onnx_runtime_writes_its_scores() -> None:
    text = {"fp32_tflops": 1.0, "bandwidth_gb_s": 10.0}
    cpu = _schema.load("cpu_fp32")
    known = replace(cpu, device=replace(cpu.device, modes={"all": _schema.Mode(**text)}))
    found = against(replace(plan_of("llava"), profile=known), WORK, Use())
    assert found.stages[2].ms == pytest.approx(102 / 10 + 100)
    assert [e.build_bytes for e in found.engines] == [None, None]


def test_what_is_not_known_is_not_reckoned() -> None:
    found = against(plan_of("llava", profile="rtx_int4"), WORK, Use())
    assert (found.first_token_ms, found.answer_ms, found.answer_j, found.have_bytes, found.fits) == (None,) * 5
    assert (found.largest.pieces, found.refusals, found.warnings) == (1, (), ())
    by_bandwidth = against(plan_of("llava", profile="gb10_int4"), WORK, Use())
    assert by_bandwidth.stages[1].compute_ms is None
    assert by_bandwidth.stages[1].bound is None
    assert by_bandwidth.stages[1].ms == pytest.approx(4 * 102 / 273)


def test_what_tensorrt_rtx_writes_out_is_at_work_too() -> None:
    """The largest quantised matrix as FP16, with NVFP4 only and with TensorRT-RTX only."""
    work = replace(WORK, engines=(replace(WORK.engines[1], widest_bytes=3 * 2**20),))
    for name, written in (("rtx_5090_nvfp4", 3), ("rtx_5090_int4", 0), ("thor_nvfp4", 0)):
        found = against(plan_of("llava", profile=name), work, Use())
        assert found.engines[0].activation_bytes == (1 + written) * 2**20
        assert any("writes every NVFP4 matrix out as FP16" in text for text in found.warnings) == bool(written)


def test_a_slower_power_mode() -> None:
    plan = plan_of("llava")
    fast, slow = (against(replace(plan, profile=p), WORK, Use()) for p in (plan.profile, plan.profile.in_mode("15W")))
    assert slow.first_token_ms / fast.first_token_ms == pytest.approx(1.6, abs=0.1)  # type: ignore[operator]
    assert slow.power_mode == "15W"


@pytest.mark.parametrize(("size", "block", "parts"), [(950, 950, 1), (951, 950, 2), (1901, 950, 3), (10**6, None, 1)])
def test_pieces(size: int, block: int | None, parts: int) -> None:
    assert pieces(size * 2**20, block) == parts


def test_the_head_of_a_7b_model_with_a_large_vocabulary() -> None:
    found = foresee(plan_of("fast_vlm"))
    assert found is not None
    assert found.warnings[0] == ("LM head needs 1.02 GiB in one piece, Jetson Orin Nano 8 GB gives 0.93: split in 2.")
    assert found.warnings[1] == (
        "Building llm takes about 20.75 GiB (5.0 × its weights), Jetson Orin Nano 8 GB has 7.44: give it swap."
    )
    assert found.fits
    found.check()


def test_two_engines_where_one_would_fit() -> None:
    found = estimate(plan_of("llava", ("visionzip:keep=64", "fastv:layer=2,keep=32")), _schema.load(NANO))
    assert found.refusals == (
        "Profile `orin_nano_8gb_int4`: does not fit. The engines need 8.20 GiB at the profile's limits (weights 7.29, activations "
        "0.09, keys and values, before and behind a step, 0.82), Jetson Orin Nano 8 GB has 7.44. Something is dropped inside the language model, so prefill "
        "and decode are engines of their own, with its weights in both: reduce before it instead.",
    )
    with pytest.raises(EnvironmentMismatch, match="does not fit") as caught:
        found.check()
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("weights", "hint"),
    [(8, "Take INT4 weights, a smaller model or a larger device."), (6, "Keep fewer visual tokens, or lower `text`, ")],
)
def test_what_to_do_depends_on_what_is_large(weights: int, hint: str) -> None:
    engine = replace(WORK.engines[1], weight_bytes=weights * 2**30, activation_bytes=2 * 2**30)
    found = against(plan_of("llava"), replace(WORK, engines=(engine,)), Use())
    assert hint in found.refusals[0]
    assert found.warnings[1].startswith(
        "Activations of llm take 2.00 GiB at the profile's limits, in one piece, Jetson"
    )


def test_more_than_the_limits() -> None:
    with pytest.raises(UsageError, match="allows text = 512, and 513 is asked for"):
        estimate(plan_of("llava"), _schema.load(NANO), Use(513, 1))


def test_it_is_data() -> None:
    record = against(plan_of("llava"), WORK, Use()).record()
    again = json.loads(json.dumps(record))
    assert (again["fits"], again["stages"][0]["bound"], again["use"]) == (
        True,
        "compute",
        {"text": 64, "new_tokens": 64},
    )


QWEN3_VL = {
    "2B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
MEASURED = [
    ("orin_nano_8gb_jp72_int4", "2B", 1017, 32.3),
    pytest.param("orin_nx_16gb_jp72_int4", "4B", 1741, 29.4, marks=pytest.mark.slow),
    pytest.param("agx_orin_64gb_jp72_int4", "4B", 758, 50.8, marks=pytest.mark.slow),
    pytest.param("agx_orin_64gb_jp72_int4", "8B", 1388, 30.6, marks=pytest.mark.slow),
]
"""TensorRT Edge-LLM 0.10 on JetPack 7.2, INT4, batch 1: ms of prefill of 2048 tokens, tokens a second. As its authors print them."""


@pytest.mark.parametrize(("name", "size", "prefill_ms", "rate"), MEASURED)
def test_no_engine_beats_the_roofline(name: str, size: str, prefill_ms: float, rate: float) -> None:
    """And a good one comes within a factor of three in prefill, of two in decode."""
    config: dict[str, Any] = json.loads(json.dumps(methods.published("qwen3_vl").config))
    config["text_config"] |= QWEN3_VL[size]
    config["vision_config"]["out_hidden_size"] = config["text_config"]["hidden_size"]
    profile = _schema.load(name)
    profile = replace(profile, limits=replace(profile.limits, text=2048))
    plan = make_plan(Checkpoint.of_config(config), (), profile)
    found = estimate(plan, profile, Use(2048 - plan.kept, 64))
    prefill, decode = found.stages[-2:]
    assert prefill.ms is not None
    assert decode.ms is not None
    assert prefill_ms / 3 < prefill.ms < prefill_ms
    assert 1000 / rate / 2 < decode.ms < 1000 / rate


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    """A device that nobody else has, in one file."""
    text = (_schema.FOLDER / f"{NANO}.toml").read_text().replace('device = "orin_nano_8gb"\n', "")
    path = tmp_path / "mine.toml"
    path.write_text(text + '[device]\ntitle = "Mine"\ncompute_capability = 87\n[device.memory]\ntotal_mib = 1024\n')
    found = against(replace(plan_of("llava"), profile=_schema.load(path)), WORK, Use())
    assert found.refusals[0].startswith("Profile `mine`: does not fit. The engines need ")
    assert "Mine has 1.00" in found.refusals[0]
