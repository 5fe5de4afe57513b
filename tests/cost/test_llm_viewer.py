"""LLM-Viewer's figures, which its own program printed (hahnyuan/LLM-Viewer, commit 472f71f, without FlashAttention): operations, bytes,
seconds and memory of prefill and of a decode step behind 2056 tokens (8 frames of 257), and seconds for 50 tokens more. Models:
Vicuna-7B (the shapes of LLaMA-7B) and, with grouped queries, Llama-3-8B."""

from __future__ import annotations

import pytest

from exporter import methods
from exporter.cost.accountings._contract import Bits, Rates, reckon
from exporter.cost.accountings.llm_viewer import ACCOUNTING
from exporter.errors import UsageError
from exporter.nn.specs import DecoderShape
from exporter.plan import make_plan
from profiles import _schema

VICUNA = DecoderShape(
    hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocab=32000, windows=(None,) * 32
)
LLAMA3 = DecoderShape(
    hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocab=128256, windows=(None,) * 32
)
A6000, A100 = Rates(768e9, 309.677e12 / 2, 309.7e12), Rates(2039e9, 312e12, 624e12)
ROWS = [
    (VICUNA, A6000, (16, 16), (28872195506176, 66201524736, 0.22793894699338343, 14813134848),
     (14173904896, 14317410816, 0.018642462000000005, 14030327808), 1.160911380326717),
    (VICUNA, A6000, (4, 16), (28872195506176, 56290908672, 0.22768294699338343, 5099126784),
     (14173904896, 4406794752, 0.005738013999999998, 4316319744), 0.5154329803267166),
    (VICUNA, A6000, (4, 4), (28872195506176, 16550381184, 0.10079180100924551, 3703283712),
     (14173904896, 3579352704, 0.004660615500000001, 3507581952), 0.3340349093425789),
    (VICUNA, A100, (16, 16), (28872195506176, 66201524736, 0.10642715138883178, 14813134848),
     (14173904896, 14317410816, 0.007021780684649338, 14030327808), 0.457836091457493),
    (LLAMA3, A6000, (16, 16), (30942227136512, 67289483776, 0.24075334641428536, 15038685184),
     (15574802432, 15304559104, 0.019927811333333344, 14228521984), 1.2373660464142855),
    (LLAMA3, A100, (4, 16), (30942227136512, 56032496128, 0.11246621441849793, 4569702400),
     (15574802432, 4047571456, 0.0019850767317312404, 3759539200), 0.21180371868529535),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "rates", "bits", "prefill", "decode", "answer"), ROWS)
def test_its_own_figures(
    spec: DecoderShape, rates: Rates, bits: tuple[int, int], prefill: tuple[float, ...], decode: tuple[float, ...], answer: float
) -> None:  # fmt: skip
    tokens, width = [2056] * 32, Bits(bits[0], bits[1], bits[1])
    for stage, expected in ((ACCOUNTING.prefill, prefill), (ACCOUNTING.decode, decode)):
        found = stage(spec, tokens, width, rates)
        assert (found.operations, found.moved, found.seconds, found.memory) == pytest.approx(expected, rel=1e-12)
    assert ACCOUNTING.answer_s(spec, tokens, tokens, 50, width, rates) == pytest.approx(answer, rel=1e-12)


def test_layers_with_fewer_tokens_cost_less() -> None:
    """LLM-Viewer has one number of tokens for all layers; with two, each half costs what half of such a model does."""
    bits = Bits(16, 16, 16)
    full, half, mixed = (
        ACCOUNTING.prefill(VICUNA, tokens, bits, A6000)
        for tokens in ([2056] * 32, [256] * 32, [2056] * 16 + [256] * 16)
    )
    assert mixed.seconds == pytest.approx((full.seconds + half.seconds) / 2)
    assert mixed.operations == pytest.approx((full.operations + half.operations) / 2)


def test_of_a_plan() -> None:
    """LLaVA-1.5-7B on an A100: the head has 32064 columns, all else is Vicuna's."""
    plan = make_plan(methods.published("llava"), ("fastv:layer=2,keep=288",), _schema.load("a100_80gb_fp16"))
    found = reckon(ACCOUNTING, plan, 64, 20)
    entering, cached = [640] * 2 + [352] * 30, [576 + 74] * 2 + [288 + 74] * 30
    bits = Bits(16, 16, 16)
    assert found["prefill"].operations == (ACCOUNTING.prefill(VICUNA, entering, bits, A100).operations + 4096 * 64)
    assert found["decode"].operations == ACCOUNTING.decode(VICUNA, cached, bits, A100).operations + 4096 * 64
    plan = make_plan(methods.published("llava"), (), _schema.load("cpu_fp32"))
    with pytest.raises(UsageError, match="profile `cpu_fp32` does not say how fast CPU computes"):
        reckon(ACCOUNTING, plan, 64, 20)
