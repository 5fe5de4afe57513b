"""Helpers for the tests of compressors: fit one, give it random tensors, run it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from graphs._compressor import Compressor
from graphs._contract import Site
from tests.graphs.oracle import trained

Array = NDArray[np.float32]


def weights_of(method: Compressor, site: Site, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random trained tensors by their names."""
    return {name: torch.from_numpy(w) for name, w in trained(method, site, seed).items()}


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest number."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert expected.abs().max() > 1e-3
