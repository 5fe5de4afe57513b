"""NVIDIA's ModelOpt: weights [out, in] as NVFP4 or FP8; a checkpoint of mixed precision has both.

NVFP4: `weight` uint8 [out, in / 2] holds two E2M1 codes, the first in the low half, `weight_scale` float8 [out, in / 16] a scale per
block, `weight_scale_2` the float32 in which these are multiplied. FP8: `weight` float8, `weight_scale` one number, one per row, or
[out / 128, 1, in / 128, 1]. `quant_algo` says which, in config.json or, in older checkpoints, in hf_quant_config.json alone.
Quantised activations and caches (`input_scale`, `k_scale`) are not imitated.

Source: modelopt/torch/export of NVIDIA/Model-Optimizer, 0.47.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.errors import CheckpointError
from exporter.packings._contract import Packing, Parts, eight_bits, nvfp4, per_channel, spread

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.quantize._contract import Quantized

ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
MIXED = "MIXED_PRECISION"
NESTED = "weight_scale_2"


class ModelOpt(Packing):
    marker = ("weight_scale",)

    def check(self, config: Mapping[str, Any]) -> None:
        told = config.get("quantization") or config
        found = {str(told.get("quant_algo"))}
        if found == {MIXED}:
            found = {str(layer.get("quant_algo")) for layer in (told.get("quantized_layers") or {}).values()}
        if unknown := sorted(name for name in found if name.upper() not in ALGORITHMS):
            raise CheckpointError(
                f"This ModelOpt checkpoint is quantised by {', '.join(unknown)}. Read are {', '.join(ALGORITHMS)}; or take the "
                "checkpoint that is not quantised."
            )

    def numbers(self, config: Mapping[str, Any], parts: Parts) -> str | None:
        return "fp4" if NESTED in parts else eight_bits(parts)

    def quantized(self, config: Mapping[str, Any], parts: Parts) -> Quantized:
        if NESTED in parts:
            return nvfp4(parts("weight"), parts("weight_scale"), parts(NESTED))
        return per_channel(parts("weight"), parts("weight_scale"))

    def read(self, config: Mapping[str, Any], parts: Parts) -> Tensor:
        weight, scale = parts("weight").float(), parts("weight_scale").float()
        if scale.ndim == 4:
            scale = scale[:, 0, :, 0]
        return (weight * spread(scale, weight)).t()


PACKING = ModelOpt()
