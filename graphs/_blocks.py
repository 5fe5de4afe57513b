"""Static building blocks shared by the methods. No data-dependent shape, no scatter, no loop over tokens.

Scores are float32 and snapped to a grid before they are ranked, so that near-ties (two frozen frames, whose
scores
differ by rounding only) become exact ties and every runtime breaks them alike: lower index first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

SNAP = 4096.0
"""Score grid: differences below 1/4096 of a score's unit count as ties."""

FORCED = 2.0**22
"""Above the range of snapped scores; float32 still tells every two of them apart."""

TINY = 1e-12
"""Least divisor, for `clamp`. Adding it would not do: ONNX optimizers take x + 1e-12 for x."""

TOPK_LIMIT = 3840
"""TensorRT's TopK takes at most this K."""


def snap(score: Tensor, unit: float | Tensor = 1.0) -> Tensor:
    """Round a score to multiples of unit / 4096, in float32: the whole numbers score · 4096 / unit.

    `unit` is the score's natural scale: a number (1 for a cosine, 1/n for attention over n tokens), or, for a
    score as large as the features happen to be, a positive tensor that is the same for all scores that are
    compared.
    """
    return torch.round(score.float() * (SNAP / unit))


def rank(score: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """int64 [..., k]: indices of the k best scores, best first, among equals the lower index first.

    Above TensorRT's TopK limit the ranks are found by comparing all pairs instead.
    """
    import graphs._ops  # noqa: F401 - registers the operator

    if k <= TOPK_LIMIT:
        out: Tensor = torch.ops.edgetrim.rank(score, k, largest)
        return out
    n = score.shape[-1]
    hit = placement(score, largest=largest).unsqueeze(-2) == torch.arange(k).unsqueeze(-1)
    found = hit.to(torch.float32) @ torch.arange(n, dtype=torch.float32).unsqueeze(-1)
    return found.squeeze(-1).to(torch.int64)


def first(score: Tensor, *, largest: bool = True) -> Tensor:
    """int64 [...]: index of the best score along the last axis, the earlier one among equals."""
    return torch.argmax(score if largest else -score, dim=-1)


def force(score: Tensor, chosen: Tensor) -> Tensor:
    """Scores that rank every token of the bool mask `chosen` before all others, and keep their order otherwise.

    A selection of K then takes the chosen ones first and fills up with the best of the rest: how a union of sets
    gets a fixed count. Snapped scores above 1023 units count as equal.
    """
    score = score.clamp(max=FORCED - 1)
    return torch.where(chosen, score + FORCED, score)


def placement(score: Tensor, *, largest: bool = True) -> Tensor:
    """int64 [..., n]: every entry's place in the order of `rank`, by comparing all pairs."""
    a, b = score.unsqueeze(-1), score.unsqueeze(-2)
    n = score.shape[-1]
    better = (b > a) if largest else (b < a)
    earlier = torch.arange(n)[None, :] < torch.arange(n)[:, None]
    return (better | ((b == a) & earlier)).to(torch.int64).sum(-1)


def ascending(index: Tensor) -> Tensor:
    """Sort int64 indices [..., k] along the last axis; above the TopK limit by comparing all pairs."""
    import graphs._ops  # noqa: F401 - registers the operator

    k = index.shape[-1]
    if k > TOPK_LIMIT:
        hit = placement(index, largest=False).unsqueeze(-2) == torch.arange(k).unsqueeze(-1)
        return (hit.to(torch.float32) @ index.to(torch.float32).unsqueeze(-1)).squeeze(-1).to(torch.int64)
    out: Tensor = torch.ops.edgetrim.ascending(index)
    return out


def select(score: Tensor, k: int) -> Tensor:
    """int64 [..., k]: indices of the k largest scores, in ascending (raster) order."""
    return ascending(rank(score, k))


def complement(index: Tensor, n: int) -> Tensor:
    """int64 [..., n - k]: the members of 0..n-1 missing in `index` [..., k]; both are ascending.

    index[i] - i members lie below index[i], so the j-th member is j plus how many i have index[i] - i <= j.
    """
    k = index.shape[-1]
    j = torch.arange(n - k)
    if k in (0, n):  # ONNX Runtime's sums over empty tensors have the wrong shape
        return j.expand(*index.shape[:-1], -1)
    below = (index - torch.arange(k)).unsqueeze(-2)
    return j + (below <= j.unsqueeze(-1)).to(torch.int64).sum(-1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather along axis 1, per sample: x [batch, n, ...], index int64 [batch, k] -> [batch, k, ...]."""
    import graphs._ops  # noqa: F401 - registers the operator

    out: Tensor = torch.ops.edgetrim.take(x, index)
    return out


def pick(x: Tensor, index: list[int]) -> Tensor:
    """Gather along axis 1 with indices known at trace time: x [batch, n, ...] -> [batch, len(index), ...]."""
    return torch.index_select(x, 1, torch.tensor(index))


def spread(index: list[int], like: Tensor) -> Tensor:
    """int64 [batch, len(index)]: indices known at trace time, one row per sample of `like` [batch, ...]."""
    return torch.tensor(index).expand(like.shape[0], -1)


def split(x: Tensor, n: int) -> Tensor:
    """[batch · n, ...] -> [batch, n, ...]."""
    return x.reshape(-1, n, *x.shape[1:])


def normalize(x: Tensor) -> Tensor:
    """Unit length along the last axis, float32; a zero vector stays zero."""
    x = x.float()
    return x / x.pow(2).sum(-1, keepdim=True).clamp(min=TINY).sqrt()


def one_hot(index: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """[..., k] -> [..., k, n] by comparison with a constant range (OneHot is not accepted everywhere)."""
    return (index.unsqueeze(-1) == torch.arange(n)).to(dtype)
