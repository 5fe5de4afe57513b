"""What the plugins compute, in numpy, as their papers and docstrings say it: no code of graphs/ or plugins/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from exporter.backends._contract import Array


def token_select(inputs: Sequence[Array], attributes: Mapping[str, int]) -> list[Array]:
    score, *tensors = inputs
    tokens, keep = attributes["tokens"], attributes["keep"]
    index = np.empty((len(score), keep), np.int64)
    for row, scores in enumerate(score):
        ranked = sorted(range(tokens), key=lambda i: (-float(scores[i]), i))
        index[row] = sorted(ranked[:keep])
    return [
        index,
        *(np.stack([np.concatenate([x[i], r[tokens:]]) for r, x, i in _rows(t, tokens, index)]) for t in tensors),
    ]


def _rows(x: Array, tokens: int, index: Array) -> list[tuple[Array, Array, Array]]:
    return [(row, row[:tokens], i) for row, i in zip(x, index, strict=True)]


def kv_compact(inputs: Sequence[Array], attributes: Mapping[str, int]) -> list[Array]:
    index, *caches = inputs
    tokens = attributes["tokens"]
    found = []
    for x in caches:
        out = np.empty((*x.shape[:2], x.shape[2] - tokens + attributes["keep"], x.shape[3]), x.dtype)
        for sample, head in np.ndindex(*x.shape[:2]):
            rows = index[sample] if index.ndim == 2 else index[sample, head]
            out[sample, head] = np.concatenate([x[sample, head][np.maximum(rows, 0)], x[sample, head, tokens:]])
        found.append(out)
    return found


def cosines(metric: Array) -> Array:
    """float64 [even, odd], in units of the grid: 4096."""
    m = metric.astype(np.float64)
    unit = m / np.sqrt(np.maximum((m**2).sum(-1, keepdims=True), 1e-12))
    found: Array = unit[::2] @ unit[1::2].T * 4096
    return found


def clear(metric: Array) -> bool:
    """Whether no cosine is so near the middle between two points of the grid that float32 may round it the other way."""
    return bool(np.abs(cosines(metric) % 1 - 0.5).min() > 1e-3)


def token_merge(inputs: Sequence[Array], attributes: Mapping[str, int]) -> list[Array]:
    """Exact where no cosine lies between two points of the grid, see `cosines`."""
    metric, hidden, size = inputs
    r = attributes["r"]
    tokens, indices, sizes = [], [], []
    for m, h, s in zip(metric, hidden.astype(np.float64), size.astype(np.float64), strict=True):
        near = np.rint(cosines(m))
        candidates = range(attributes["protected"], len(near))
        goes = sorted(candidates, key=lambda a: (-near[a].max(), a))[:r]
        whole, mean = s.copy(), h * s[:, None]
        for a in goes:
            b = 2 * int(near[a].argmax()) + 1
            mean[b] += mean[2 * a]
            whole[b] += whole[2 * a]
        index = [2 * a for a in range(len(near)) if a not in goes] + list(range(1, len(h), 2))
        tokens.append(np.where((np.arange(len(h)) % 2 == 0)[:, None], h, mean / whole[:, None])[index])
        indices.append(index)
        sizes.append(whole[index])
    return [np.stack(tokens).astype(hidden.dtype), np.array(indices, np.int64), np.stack(sizes).astype(np.float32)]
