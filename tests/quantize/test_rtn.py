"""INT4 in blocks: against a slow loop, and byte by byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from exporter.quantize import rtn
from exporter.quantize._contract import Quantized, block_size

Floats = npt.NDArray[np.float32]


def weight(inputs: int, outputs: int, seed: int = 0) -> Floats:
    """Heavy tails: some blocks are better off clipped."""
    return np.random.default_rng(seed).standard_t(3, (inputs, outputs)).astype(np.float32)


def unpacked(quantized: Quantized, shape: tuple[int, int]) -> Any:
    """Integers as ONNX reads them."""
    data = quantized.q.numpy().tobytes()
    tensor = onnx.helper.make_tensor("q", onnx.TensorProto.INT4, shape, data, raw=True)
    return onnx.numpy_helper.to_array(tensor).astype(np.int8)


def slow(w: Floats, block: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """Every block of every column on its own: the scale with the least squared error, the first among equals."""
    q, scales = np.zeros(w.shape, np.int8), np.zeros((len(w) // block, w.shape[1]), np.float32)
    for b in range(len(scales)):
        for column in range(w.shape[1]):
            values = w[b * block : (b + 1) * block, column]
            top = max(np.abs(values).max(), np.float32(1e-8))
            errors = []
            for clip in rtn.CLIPS:
                scale = np.float32(top / np.float32(clip))
                found = np.clip(np.rint(values / scale), -8, 7)
                errors.append((float(((found * scale - values).astype(np.float64) ** 2).sum()), scale, found))
            _, scales[b, column], q[b * block : (b + 1) * block, column] = min(errors, key=lambda e: e[0])
    return q, scales


@pytest.mark.parametrize(("inputs", "outputs", "block"), [(32, 2, 32), (128, 6, 32), (256, 4, 128), (64, 10, 64)])
def test_against_a_loop(inputs: int, outputs: int, block: int) -> None:
    w = weight(inputs, outputs)
    found = rtn.quantize(torch.from_numpy(w), block)
    q, scale = slow(w, block)
    assert (unpacked(found, w.shape) == q).all()
    assert np.allclose(found.scale.numpy(), scale, rtol=1e-6)
    assert np.allclose(found.dequantized().numpy(), q * scale.repeat(block, 0), rtol=1e-6)


def test_the_first_value_is_the_low_half_of_the_byte() -> None:
    w = torch.zeros(32, 2)
    w[0] = torch.tensor([7.0, -7.0])
    w[1] = torch.tensor([1.0, -2.0])
    found = rtn.quantize(w, 32)
    packed, scale = found.q, found.scale
    assert scale.tolist() == [[1.0, 1.0]]
    assert packed[:3].tolist() == [0x97, 0xE1, 0x00]


def test_error_is_at_most_half_a_step_where_nothing_is_clipped() -> None:
    w = torch.from_numpy(weight(256, 8))
    found = rtn.quantize(w, 64)
    scale = found.scale
    error = (found.dequantized() - w).abs().unflatten(0, (-1, 64))
    step = scale.unsqueeze(1)
    inside = w.unflatten(0, (-1, 64)).abs() <= 7 * step
    assert (error <= 0.5001 * step)[inside].all()
    assert inside.float().mean() > 0.9


def test_the_search_is_never_worse_than_the_plain_scale() -> None:
    w = torch.from_numpy(weight(512, 16))
    blocks = w.unflatten(0, (-1, 128))
    plain = blocks.abs().amax(1, keepdim=True) / 7
    before = ((blocks / plain).round() * plain - blocks).pow(2).sum(1)
    after = (rtn.quantize(w, 128).dequantized().unflatten(0, (-1, 128)) - blocks).pow(2).sum(1)
    assert (after <= before * 1.0001).all()
    assert after.sum() < 0.99 * before.sum()


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, -3.0])
def test_constant_blocks(value: float) -> None:
    w = torch.full((32, 2), value)
    found = rtn.quantize(w, 32).dequantized()
    assert torch.isfinite(found).all()
    assert torch.allclose(found, w, rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize(("inputs", "expected"), [(4096, 128), (192, 64), (96, 32), (100, None)])
def test_block_size(inputs: int, expected: int | None) -> None:
    assert block_size(inputs) == expected


def test_half_precision_weights_are_quantised_in_float32() -> None:
    w = torch.from_numpy(weight(64, 4)).bfloat16()
    assert torch.equal(rtn.quantize(w, 64).q, rtn.quantize(w.float(), 64).q)


@pytest.mark.parametrize("outputs", [rtn.CHANNELS - 2, rtn.CHANNELS + 6, 3 * rtn.CHANNELS])
@pytest.mark.parametrize("transposed", [True, False])
def test_channels_are_quantised_alike_wherever_they_stand(outputs: int, transposed: bool) -> None:
    """More channels than are taken at a time, in either layout in memory."""
    w = torch.from_numpy(weight(64, outputs))
    given = w.t().contiguous().t() if transposed else w
    found = rtn.quantize(given, 32)
    q, scale = slow(w.numpy(), 32)
    assert (unpacked(found, (64, outputs)) == q).all()
    assert np.allclose(found.scale.numpy(), scale, rtol=1e-6)


def test_what_is_in_float32_does_not_grow_with_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, nearest = [], rtn._nearest
    monkeypatch.setattr(rtn, "_nearest", lambda blocks, *rest: largest.append(blocks.numel()) or nearest(blocks, *rest))
    rtn.quantize(torch.from_numpy(weight(64, 4 * rtn.CHANNELS)), 32)
    assert largest == [64 * rtn.CHANNELS] * 4
