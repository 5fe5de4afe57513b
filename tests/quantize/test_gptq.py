"""GPTQ against the published procedure, step by step: one channel rounded, its error spread, the inverse Hessian reduced."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from exporter.errors import ExportError
from exporter.quantize import gptq, rtn
from exporter.quantize._contract import Seen

Doubles = npt.NDArray[np.float64]


def correlated(tokens: int, inputs: int, seed: int = 0) -> Doubles:
    """Activations with a few large channels, and far fewer directions than channels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, 6)) @ rng.normal(size=(6, inputs)) + 0.3 * rng.normal(size=(tokens, inputs))
    return x * np.exp(rng.normal(size=inputs))


def naive(w: Doubles, gram: Doubles, scale: Doubles, block: int) -> npt.NDArray[np.int8]:
    """Optimal brain quantisation with a fixed order: no Cholesky factor, no lazy batches; the inverse is updated every time."""
    w, inverse = w.copy(), np.linalg.inv(gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram)))
    q = np.zeros(w.shape, np.int8)
    for i in np.argsort(-np.diag(gram), kind="stable"):
        step = scale[i // block]
        q[i] = np.clip(np.rint(w[i] / step), -8, 7)
        error = (w[i] - q[i] * step) / inverse[i, i]
        w -= inverse[:, i, None] * error
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i], inverse[:, i] = 0, 0
    return q


@pytest.mark.parametrize(("inputs", "block"), [(32, 32), (96, 32), (256, 64)])
def test_against_the_procedure_channel_by_channel(inputs: int, block: int) -> None:
    """256 channels are more than what is updated lazily."""
    x = correlated(400, inputs)
    w = np.random.default_rng(1).normal(size=(inputs, 8))
    gram = x.T @ x / len(x)
    found = gptq.quantize(torch.from_numpy(w).float(), block, torch.from_numpy(gram).float())
    expected = naive(w, gram, found.scale.double().numpy(), block)
    assert (found.integers().numpy() == expected).mean() > 0.995  # float32 here, float64 there: a tie now and then
    assert (found.integers().numpy() != rtn.quantize(torch.from_numpy(w), block).integers().numpy()).mean() > 0.1


def test_outputs_change_less_than_by_rounding() -> None:
    x, w = torch.from_numpy(correlated(600, 128)).float(), torch.randn(128, 16, generator=torch.manual_seed(0))
    seen = Seen(128, gram=True)
    seen.add(x[:400])
    errors = [
        float(((x[400:] @ (q.dequantized() - w)) ** 2).mean())
        for q in (gptq.QUANTIZER.quantize(w, 32, seen), rtn.quantize(w, 32))
    ]
    assert errors[0] < 0.5 * errors[1]


def test_channels_that_nothing_enters_do_no_harm() -> None:
    x = torch.from_numpy(correlated(100, 64)).float()
    x[:, 5] = 0
    seen = Seen(64, gram=True)
    seen.add(x)
    found = gptq.QUANTIZER.quantize(torch.randn(64, 4, generator=torch.manual_seed(0)), 32, seen).dequantized()
    assert torch.isfinite(found).all()
    assert (found[5] == 0).all()


def test_more_channels_than_tokens_are_damped() -> None:
    x = torch.from_numpy(correlated(3, 64)).float()
    factor = gptq.inverse_factor(x.t() @ x)
    assert torch.isfinite(factor).all()


def test_activations_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ExportError, match="Pass other --calibration"):
        gptq.inverse_factor(torch.full((4, 4), torch.nan))
