from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from graphs._contract import ReductionError, Site
from graphs.hires import HiRes
from tests.graphs.compressing import close, normal, weights_of

Array = NDArray[np.float32]
SITE = Site(24, 2, (4, 6), frozenset({"hidden"}), dim=8, llm_dim=12)


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """EMOVA's configuration: InternViT of 448 pixels, Llama 3.1 8B."""
    published = {
        "model.mm_projector.downsampler.norm_media.weight": (1024,),
        "model.mm_projector.downsampler.norm_media.bias": (1024,),
        "model.mm_projector.downsampler.norm_context.weight": (1024,),
        "model.mm_projector.downsampler.norm_context.bias": (1024,),
        "model.mm_projector.downsampler.to_q.weight": (1024, 1024),
        "model.mm_projector.downsampler.to_kv.weight": (2048, 1024),
        "model.mm_projector.mlp.0.weight": (4096, 1024),
        "model.mm_projector.mlp.0.bias": (4096,),
        "model.mm_projector.mlp.2.weight": (4096, 4096),
        "model.mm_projector.mlp.2.bias": (4096,),
    }
    site = Site(1024, 1, (32, 32), frozenset({"hidden"}), dim=1024, llm_dim=4096)
    method = HiRes().fit(site)
    assert {HiRes.prefixes[1] + name: shape for name, shape in method.trained(site).items()} == published
    assert (method.heads, method.after(site).grid) == (16, (16, 16))


@pytest.mark.parametrize("heads", [1, 4])
def test_against_loops(heads: int) -> None:
    method = HiRes(heads=heads).fit(SITE)
    x, named = normal(2, 2, 24, 8), weights_of(method, SITE)
    weights = {name: w.numpy() for name, w in named.items()}
    expected = np.stack([expect(frame.numpy(), weights, heads) for frame in x.flatten(0, 1)]).reshape(2, 2, 6, 12)
    close(method.forward({"hidden": x} | named, SITE), torch.from_numpy(expected))


def expect(x: Array, w: dict[str, Array], heads: int) -> Array:
    """One frame of 4 × 6 tokens, cell by cell and head by head."""

    def norm(name: str, v: Array) -> Array:
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5)
        return v * w[f"downsampler.{name}.weight"] + w[f"downsampler.{name}.bias"]

    out = []
    for corner in (0, 2, 4, 12, 14, 16):
        cell = x[[corner, corner + 1, corner + 6, corner + 7]]
        query = norm("norm_media", cell.mean(0))
        seen = np.concatenate([norm("norm_context", cell), query[None]])
        joint = seen @ w["downsampler.to_kv.weight"].T
        keys, values, q = joint[:, :8], joint[:, 8:], query @ w["downsampler.to_q.weight"].T
        found = np.empty(8, np.float32)
        for head in range(heads):
            part = slice(head * 8 // heads, (head + 1) * 8 // heads)
            shares = np.exp(keys[:, part] @ q[part] / math.sqrt(8 // heads))
            found[part] = shares / shares.sum() @ values[:, part]
        h = found @ w["mlp.0.weight"].T + w["mlp.0.bias"]
        h = h * np.array([1 + math.erf(a / 2**0.5) for a in h], np.float32) / 2
        out.append(h @ w["mlp.2.weight"].T + w["mlp.2.bias"])
    return np.stack(out).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "method", "words"),
    [
        ({"tokens": 20, "grid": (4, 5)}, HiRes(), "`side` must divide both sides of 4 × 5"),
        ({}, HiRes(side=3), "`side` must divide both sides of 4 × 6 tokens; found 3"),
        ({}, HiRes(heads=3), "`heads` must divide the width 8"),
        ({"grid": None}, HiRes(), "whole raster"),
    ],
)
def test_what_does_not_fit(change: dict[str, object], method: HiRes, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        method.fit(dataclasses.replace(SITE, **change))  # type: ignore[arg-type]
