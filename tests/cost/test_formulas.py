"""Counting, against the formula of the papers and what they print."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exporter import methods
from exporter.cost import formulas as cost
from exporter.plan import make_plan
from profiles import _schema

SPEC = methods.fit("uniform", methods.published("llava")).plan.family.decoder(methods.published("llava"))  # type: ignore[union-attr]
"""Vicuna-7B."""


def test_the_formula_of_the_papers() -> None:
    n, d, m = 640, 4096, 11008
    assert cost.layer_flops(SPEC, n) == 8 * n * d * d + 6 * n * d * m + 4 * n * n * d
    assert cost.prefill_flops(SPEC, [n] * 32) == 32 * cost.layer_flops(SPEC, n)


@pytest.mark.parametrize(("text", "share"), [(0, 0.545), (64, 0.591)])
def test_fastv_of_layer_3_and_half(text: int, share: float) -> None:
    """FastV prints 57.9 % for K = 3, R = 0.5; how much it is depends on the text that is counted with it."""
    pruned = cost.prefill_flops(SPEC, [576 + text] * 3 + [288 + text] * 29)
    full = cost.prefill_flops(SPEC, [576 + text] * 32)
    assert pruned / full == pytest.approx(share, abs=0.005)
    assert 0.54 < pruned / full < 0.61


def test_grouped_queries_cost_less() -> None:
    grouped = replace(SPEC, kv_heads=8)
    saved = cost.layer_flops(SPEC, 10) - cost.layer_flops(grouped, 10)
    assert saved == 4 * 10 * 4096 * (4096 - 1024)
    assert cost.cache_bytes(grouped, [10] * 32, 2) * 4 == cost.cache_bytes(SPEC, [10] * 32, 2)


def test_cache_bytes() -> None:
    assert cost.cache_bytes(SPEC, [576] * 32, 2) == 576 * 32 * 2 * 4096 * 2


@pytest.mark.parametrize(
    ("spec", "entering", "cached"),
    [
        ("fastv:layer=3,keep=288", [576] * 3 + [288] * 29, [576] * 3 + [288] * 29),
        ("lookm:keep=64", [576] * 32, [64] * 32),
        ("glimpse:weights=any,keep=64,layer=21", [576] * 22 + [64] * 10, [64] * 32),
        ("dycoke_kv:keep=64,layer=3", [576] * 32, [576] * 3 + [64] * 29),
    ],
)
def test_tokens_of_every_layer(spec: str, entering: list[int], cached: list[int]) -> None:
    plan = make_plan(methods.published("llava"), [spec], _schema.load("cpu_fp32"))
    assert list(plan.kv.entering) == entering
    assert list(plan.kv.cached) == cached
