"""compressed-tensors (llm-compressor): weights [out, in] as packed INT4, INT8, FP8 or NVFP4; one checkpoint may have several.

"pack-quantized": `weight_packed` int32 [out, in / 8] holds q + 8, `weight_scale` [out, groups], `weight_shape`, and, if asymmetric,
`weight_zero_point` int32 [out / 8, groups] packed alike (int8 [out, groups] in old files), and `weight_g_idx` where groups are
scattered. Weight = scale * (q - zero). "int-quantized" and "float-quantized" hold `weight` in int8 or float8 beside `weight_scale`
[out, groups], [out, 1], [1], or one for every square of a weight cut into blocks. "nvfp4-pack-quantized": `weight_packed` uint8
[out, in / 2] holds E2M1 codes, `weight_scale` float8 [out, in / 16] is divided by `weight_global_scale`. Quantised activations are not
imitated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.errors import CheckpointError
from exporter.packings._contract import Packing, Parts, assembled, eight_bits, nvfp4, per_channel, spread, unpacked

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.quantize._contract import Quantized

PACKED = "pack-quantized"
GLOBAL = "weight_global_scale"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized")


class CompressedTensors(Packing):
    marker = ("weight_packed", "weight_scale")

    def check(self, config: Mapping[str, Any]) -> None:
        groups = [(g.get("format") or config.get("format"), g) for g in (config.get("config_groups") or {}).values()]
        layouts = {str(config.get("format")), *(str(layout) for layout, _ in groups)} - {"mixed-precision"}
        if unknown := sorted(layouts - set(FORMATS)):
            raise CheckpointError(
                f"This compressed-tensors checkpoint has format {', '.join(unknown)}. Read are {', '.join(FORMATS)}."
            )
        bits = {int(g["weights"]["num_bits"]) for layout, g in groups if layout == PACKED and g.get("weights")}
        if not bits <= {4, 8}:
            raise CheckpointError(f"This compressed-tensors checkpoint packs {sorted(bits)} bits. Read are 4 and 8.")

    def numbers(self, config: Mapping[str, Any], parts: Parts) -> str | None:
        if GLOBAL in parts:
            return "fp4"
        if "weight_packed" in parts:
            return "int4" if _bits(parts) == 4 else None
        return None if "weight_zero_point" in parts else eight_bits(parts)

    def quantized(self, config: Mapping[str, Any], parts: Parts) -> Quantized:
        if GLOBAL in parts:
            return nvfp4(parts("weight_packed"), parts("weight_scale"), parts(GLOBAL).float().reciprocal())
        if "weight_packed" not in parts:
            return per_channel(parts("weight"), parts("weight_scale"))
        outputs, inputs = (int(n) for n in parts("weight_shape"))
        q = unpacked(parts("weight_packed"), 1)[:outputs, :inputs] - 8
        scale, zero = parts("weight_scale"), _zero(parts, 4)
        group = parts("weight_g_idx") if "weight_g_idx" in parts else None
        if group is not None and bool((group < 0).any()):  # how "no order" is written
            group = None
        return assembled(q.t(), None if zero is None else zero.t(), scale.t(), group)

    def read(self, config: Mapping[str, Any], parts: Parts) -> Tensor:
        if "weight_packed" in parts:
            outputs, inputs = (int(n) for n in parts("weight_shape"))
            weight = unpacked(parts("weight_packed"), 1, 8)[:outputs, :inputs].float() - 128
        else:
            weight = parts("weight").float()
        zero = _zero(parts, 8)
        if zero is not None:
            weight = weight - spread(zero.float(), weight)
        return (weight * spread(parts("weight_scale").float(), weight)).t()


def _bits(parts: Parts) -> int:
    """Of an integer in a packed matrix, 4 or 8."""
    inputs = int(parts("weight_shape")[1])
    return 4 if parts("weight_packed").shape[1] * 8 < inputs + 8 else 8


def _zero(parts: Parts, bits: int) -> Tensor | None:
    """int [out, groups], counted as the integers are."""
    import torch

    if "weight_zero_point" not in parts:
        return None
    found = parts("weight_zero_point")
    if found.dtype != torch.int32:
        return found
    outputs = len(parts("weight_scale"))
    values: Tensor = unpacked(found, 0, bits)[:outputs].to(torch.int16) - 2 ** (bits - 1)
    return values


PACKING = CompressedTensors()
