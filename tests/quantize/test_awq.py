"""AWQ: the grid searched by hand, and what is folded into the layer before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from exporter.nn.decoder_layer import Layer
from exporter.nn.specs import DecoderSpec
from exporter.quantize import awq, rtn
from exporter.quantize._contract import Seen

SPEC = DecoderSpec(
    hidden=32, layers=1, heads=4, kv_heads=4, head_dim=8, intermediate=64, vocab=10, eps=1e-6, activation="silu",
    qkv_bias=True, output_bias=False, inv_freq=(1.0, 0.1, 0.01, 0.001), rope_scale=1.0, mrope_section=None, windows=(None,),
    attention_scale=8**-0.5,
)  # fmt: skip


def seen(x: torch.Tensor) -> Seen:
    found = Seen(x.shape[1])
    found.add(x)
    return found


def test_the_scale_is_the_grid_s_best() -> None:
    """By a loop in numpy over the published formula: s = mean|x|^α, divided by sqrt(max * min)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 64)) * np.exp(1.5 * rng.normal(size=64))
    weights = [rng.normal(size=(64, 6)) for _ in range(2)]
    losses, scales = [], []
    for i in range(20):
        s = np.abs(x).mean(0) ** (i / 20)
        s /= np.sqrt(s.max() * s.min())
        loss = 0.0
        for w in weights:
            blocks = (w * s[:, None]).reshape(2, 32, 6)
            step = np.abs(blocks).max(1, keepdims=True) / 7
            rounded = (np.clip(np.rint(blocks / step), -8, 7) * step).reshape(64, 6) / s[:, None]
            loss += ((x @ rounded - x @ w) ** 2).mean()
        losses.append(loss)
        scales.append(s)
    best = int(np.argmin(losses))
    assert best > 0  # else nothing was searched
    given = [torch.from_numpy(w).float() for w in weights]
    found = awq.QUANTIZER.scale(given, seen(torch.from_numpy(x).float()), 32)
    assert found is not None
    assert np.allclose(found.numpy(), scales[best], rtol=1e-4)


def test_clipping_points_count_what_enters() -> None:
    """A block whose outlier meets nothing is clipped; rounding alone would keep it."""
    w = torch.full((32, 2), 0.5)
    w[0] = 8.0
    x = torch.ones(10, 32)
    x[:, 0] = 1e-3
    found, plain = awq.QUANTIZER.quantize(w, 32, seen(x)), rtn.quantize(w, 32)
    errors = [float((x @ (q.dequantized() - w)).square().mean()) for q in (found, plain)]
    assert errors[0] < 0.5 * errors[1]


OPT = replace(SPEC, layer_norms=True, gated=False, activation="relu", inv_freq=())
PAIRS = {SPEC: 4, replace(SPEC, kv_heads=2): 3, replace(SPEC, post_norms=True, qk_norm=True): 4, OPT: 3}


@pytest.mark.parametrize("spec", PAIRS)
def test_folding_leaves_the_layer_as_it_is(spec: DecoderSpec) -> None:
    generator = torch.manual_seed(0)
    layer = Layer(spec).double()
    for parameter in layer.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.4
    x = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64)
    turns = (torch.ones(1, 1, 5, 4), torch.zeros(1, 1, 5, 4)) if spec.inv_freq else (None, None)
    given = x, *turns, torch.zeros(2, 1, 5 * spec.heads // spec.kv_heads, 5)
    before = layer(*given, None, None)[0]
    pairs = layer.pairs()
    assert len(pairs) == PAIRS[spec]
    for pair in pairs:
        scale = torch.rand(len(pair.readers[0].weight), generator=generator, dtype=torch.float64) + 0.5
        for parameter in pair.giver.parameters(recurse=False):
            parameter.data[..., pair.columns] /= scale
        for reader in pair.readers:
            reader.weight.data *= scale[:, None]
    after = layer(*given, None, None)[0]
    exact = not spec.layer_norms  # those are float32 throughout
    assert torch.allclose(before, after, rtol=1e-10 if exact else 1e-4, atol=0.0 if exact else 1e-4)


def test_what_was_seen_follows_a_scale() -> None:
    x = torch.randn(300, 8, generator=torch.manual_seed(0))
    scale = torch.linspace(0.5, 2, 8)
    divided, directly = seen(x).divided(scale), seen(x / scale)
    assert torch.allclose(divided.magnitude, directly.magnitude, rtol=1e-5)
    assert torch.allclose(divided.power, directly.power, rtol=1e-5)
    assert torch.allclose(divided.rows, directly.rows)


def test_the_tokens_kept_are_evenly_spaced_and_bounded() -> None:
    x = torch.arange(5000.0)[:, None]
    one = Seen(1)
    for part in x.split(37):
        one.add(part)
    rows = one.rows[:, 0]
    assert Seen.MOST / 2 <= len(rows) <= Seen.MOST
    assert len(rows.diff().unique()) == 1
    assert rows[-1] > 4900
