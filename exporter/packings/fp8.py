"""FP8 in squares (DeepSeek, Qwen): `weight` float8 [out, in] and `weight_scale_inv`, which multiplies every square of 128 × 128."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.packings._contract import Packing, Parts

if TYPE_CHECKING:
    from torch import Tensor


class Fp8(Packing):
    marker = ("weight_scale_inv",)

    def check(self, config: Mapping[str, Any]) -> None:
        """There is one variant."""

    def read(self, config: Mapping[str, Any], parts: Parts) -> Tensor:
        weight, scale = parts("weight").float(), parts("weight_scale_inv").float()
        rows, cols = (int(n) for n in config.get("weight_block_size") or (128, 128))
        scale = scale.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(cols, 1)[:, : weight.shape[1]]
        return (weight * scale).t()


PACKING = Fp8()
