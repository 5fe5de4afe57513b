"""Helpers for the NumPy oracles: the documented score grid, ranks by a plain Python sort, and test features."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from graphs._contract import BeforeLLM, Reduction, Site

Array = NDArray[np.float32]
KINDS = ("random", "ties", "equal", "frozen")


def grid(score: float, unit: float = 1.0) -> int:
    """A score as the methods compare it: to 1/4096 of its unit."""
    return round(float(score) * 4096 / unit)


def best(scores: list[int], k: int) -> list[int]:
    """Places of the k largest, best first, the earlier among equals."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def cosine(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm = np.sqrt((a * a).sum() + 1e-12) * np.sqrt((b * b).sum() + 1e-12)
    return float((a * b).sum() / norm)


def features(kind: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Features [batch, frames, tokens, dim] (any axes): random; from three prototypes; all equal; all frames equal."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "ties":
        prototypes = rng.standard_normal((3, shape[-1])).astype(np.float32)
        x = prototypes[rng.integers(0, 3, shape[:-1])]
    elif kind == "equal":
        x = np.broadcast_to(x.reshape(-1, shape[-1])[0], shape).copy()
    elif kind == "frozen" and len(shape) > 2:
        x = np.broadcast_to(x[:, :1], shape).copy()
    return x


def attention(kind: str, shape: tuple[int, ...], seed: int = 1) -> Array:
    """Attention [..., tokens], rows summing to at most one."""
    rng = np.random.default_rng(seed)
    x = rng.random(shape)
    if kind == "ties":
        x = rng.integers(1, 4, shape).astype(np.float64)
    elif kind == "equal":
        x = np.ones(shape)
    elif kind == "frozen" and len(shape) > 2:
        x = np.broadcast_to(x[:, :1], shape)
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


def trained(method: Reduction, site: Site, seed: int = 0) -> dict[str, Array]:
    """Random tensors of the names and shapes that a method has for its trained ones."""
    rng = np.random.default_rng(seed)
    return {name: 0.5 * rng.standard_normal(s).astype(np.float32) for name, s in method.trained(site).items()}


def run(method: BeforeLLM, given: dict[str, Array]) -> tuple[Array, Array]:
    """Tokens and index of a fitted method that only chooses."""
    out = method.forward({k: torch.from_numpy(given[k]) for k in method.needs})
    assert out.size is None
    return out.tokens.numpy(), out.index.numpy()


def run_merging(method: BeforeLLM, given: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Tokens, index and size of a fitted method that merges."""
    out = method.forward({k: torch.from_numpy(given[k]) for k in method.needs})
    assert out.size is not None
    return out.tokens.numpy(), out.index.numpy(), out.size.numpy()


GUIDED = Site(20, 2, (4, 5), frozenset({"hidden", "text", "text_mask"}))
"""Where a question meets the tokens in the language model's space, and below also in CLIP's."""
GUIDED_BY_CLIP = Site(20, 2, (4, 5), GUIDED.signals | {"aligned", "aligned_text"})


def guided(kind: str, dim: int, text: int = 5, shared: int = 6) -> dict[str, Array]:
    """Signals of two samples for either site, the first question of three tokens and padding."""
    mask = np.ones((2, text), np.float32)
    mask[0, 3:] = 0
    return {
        "hidden": features(kind, (2, GUIDED.frames, GUIDED.tokens, dim)),
        "aligned": features(kind, (2, GUIDED.frames, GUIDED.tokens, shared), 1),
        "aligned_text": features("random", (2, shared), 2),
        "text": features("random", (2, text, dim), 3),
        "text_mask": mask,
    }
