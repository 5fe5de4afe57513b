"""Three operators whose eager form and ONNX form are the same function: rank, ascending, take.

ONNX TopK puts the lower index first among equals. `torch.topk` promises nothing and `torch.sort(stable=True)`
has no ONNX translation; so `rank` is a stable sort when run eagerly and TopK when exported. `ascending` sorts
indices by TopK on INT64, `take` is GatherND with batch_dims=1 (3x faster than an expanded GatherElements on
ONNX Runtime's CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset21

op: Any = opset21


@torch.library.custom_op("edgetrim::rank", mutates_args=())
def rank(score: torch.Tensor, k: int, largest: bool) -> torch.Tensor:
    """Indices of the k largest (smallest), best first; among equals the lower index first."""
    return torch.sort(score, dim=-1, descending=largest, stable=True).indices[..., :k].contiguous()


@rank.register_fake
def _(score: torch.Tensor, k: int, largest: bool) -> torch.Tensor:
    return score.new_empty((*score.shape[:-1], k), dtype=torch.int64)


def _rank_onnx(score: Any, k: int, largest: bool) -> Any:
    _, index = op.TopK(score, op.Constant(value_ints=[k]), axis=-1, largest=int(largest), sorted=1)
    return index


@torch.library.custom_op("edgetrim::ascending", mutates_args=())
def ascending(index: torch.Tensor) -> torch.Tensor:
    """int64 [..., k] sorted along the last axis."""
    return torch.sort(index, dim=-1).values


@ascending.register_fake
def _(index: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(index)


def _ascending_onnx(index: Any) -> Any:
    values, _ = op.TopK(index, op.Constant(value_ints=[index.shape[-1]]), axis=-1, largest=0, sorted=1)
    return values


@torch.library.custom_op("edgetrim::take", mutates_args=())
def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [batch, n, ...], index int64 [batch, k] -> [batch, k, ...]."""
    return torch.stack([row.index_select(0, i) for row, i in zip(x, index, strict=True)])


@take.register_fake
def _(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*index.shape, *x.shape[2:]))


def _take_onnx(x: Any, index: Any) -> Any:
    return op.GatherND(x, op.Unsqueeze(index, op.Constant(value_ints=[-1])), batch_dims=1)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.edgetrim.rank.default: _rank_onnx,
    torch.ops.edgetrim.ascending.default: _ascending_onnx,
    torch.ops.edgetrim.take.default: _take_onnx,
}
