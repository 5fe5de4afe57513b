"""Whatever lies in exporter/quantize and exporter/packings keeps its contract."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import exporter.packings
import exporter.quantize
from exporter import _discover
from exporter.errors import CheckpointError
from exporter.packings._contract import Packing
from exporter.quantize import rtn
from exporter.quantize._contract import Form, Quantizer, Seen
from exporter.stages._store import check_range
from profiles._schema import quantizers


@pytest.mark.parametrize("name", quantizers())
@pytest.mark.parametrize("block", [16, 64])
def test_a_quantizer_gives_the_layout_and_little_error(name: str, block: int) -> None:
    found: Quantizer = _discover.load(exporter.quantize, "quantizer", name).QUANTIZER
    assert found.summary
    weight = torch.randn(128, 10, generator=torch.manual_seed(0))
    seen = Seen(128, found.gram)
    seen.add(torch.randn(300, 128, generator=torch.manual_seed(1)))
    scale = found.scale([weight], seen, block)
    assert scale is None or (scale.shape == (128,) and (scale > 0).all())
    made = found.quantize(weight, block, seen)
    assert made.form == Form(4, block)
    assert made.shape == weight.shape
    assert (made.scale > 0).all()
    assert made.q.numel() == 128 * 10 // 2
    plain = rtn.quantize(weight, block, clips=(7.0,)).dequantized()
    assert seen.energy(made.dequantized() - weight) <= 1.05 * seen.energy(plain - weight)


@pytest.mark.parametrize("name", sorted({*_discover.names(exporter.quantize)} - {*quantizers()}))
def test_what_makes_another_type_says_which(name: str) -> None:
    found: Quantizer = _discover.load(exporter.quantize, "quantizer", name).QUANTIZER
    form = found.form(48, ())
    assert found.summary
    assert form is not None
    assert name.endswith(form.numbers)
    weight = torch.randn(48, 10, generator=torch.manual_seed(0))
    made = found.quantize(weight, form.block)
    assert (made.form, made.shape) == (form, weight.shape)
    assert (made.dequantized() - weight).abs().max() < weight.abs().max() / 2 ** (form.bits / 2)


@pytest.mark.parametrize("name", [name for name in _discover.names(exporter.quantize) if name not in ("awq", "gptq")])
@pytest.mark.parametrize("wrong", [1e5, -1e5, float("inf"), float("nan")])
def test_what_would_leave_float16_is_seen_by_the_scales(name: str, wrong: float) -> None:
    """Without a look at every weight: nothing that is dequantised is beyond `largest`, and an infinite weight is not lost in it."""
    found: Quantizer = _discover.load(exporter.quantize, "quantizer", name).QUANTIZER
    weight = torch.randn(128, 10, generator=torch.manual_seed(0))
    form = found.form(128, (64,))
    assert form is not None
    made = found.quantize(weight, form.block)
    each = made.largest.repeat_interleave(form.block, 0)
    assert (made.dequantized().abs() <= each * (1 + 1e-6)).all()
    assert (each <= 2.3 * weight.abs().amax()).all()
    check_range("w", made.largest, torch.float16)
    weight[5, 3] = wrong
    with pytest.raises(CheckpointError, match="`w` does not fit float16"):
        check_range("w", found.quantize(weight, form.block).largest, torch.float16)


@pytest.mark.parametrize("name", _discover.names(exporter.packings))
def test_a_packing_needs_no_torch_to_be_found(name: str) -> None:
    found: Packing = _discover.load(exporter.packings, "packing", name).PACKING
    assert found.marker
    code = f"import sys, exporter.packings.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
