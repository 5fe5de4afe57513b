"""compressed-tensors (llm-compressor): weights [out, in] as packed INT4, INT8 or FP8.

"pack-quantized": `weight_packed` int32 [out, in / 8] holds q + 8, `weight_scale` [out, groups], `weight_shape`, and, if asymmetric,
`weight_zero_point` int32 [out / 8, groups] packed alike (int8 [out, groups] in old files), and `weight_g_idx` where groups are
scattered. Weight = scale * (q - zero). "int-quantized" and "float-quantized" hold `weight` in int8 or float8 beside `weight_scale`
[out, groups], [out, 1], [1], or one for every square of a weight cut into blocks. Quantised activations are not imitated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.errors import CheckpointError
from exporter.packings._contract import Packing, Parts, assembled, unpacked

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.quantize._contract import Quantized

PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")


class CompressedTensors(Packing):
    marker = ("weight_packed", "weight_scale")

    def bits(self, config: Mapping[str, Any]) -> int:
        layouts = {str(config.get("format"))}
        groups = list((config.get("config_groups") or {}).values())
        layouts |= {str(g["format"]) for g in groups if g.get("format")}
        layouts -= {"mixed-precision"}
        if unknown := sorted(layouts - set(FORMATS)):
            raise CheckpointError(
                f"This compressed-tensors checkpoint has format {', '.join(unknown)}. Read are {', '.join(FORMATS)}."
            )
        bits = {int(g["weights"]["num_bits"]) for g in groups if g.get("weights")}
        if PACKED in layouts and len(layouts) == 1:
            if len(bits) != 1 or not bits <= {4, 8}:
                raise CheckpointError(
                    f"This compressed-tensors checkpoint packs {sorted(bits)} bits. Read are 4 or 8, the same everywhere."
                )
            return bits.pop()
        if PACKED in layouts:
            raise CheckpointError(
                f"This compressed-tensors checkpoint mixes {' and '.join(sorted(layouts))}. Read is one format at a time."
            )
        return 8

    def quantized(self, config: Mapping[str, Any], parts: Parts) -> Quantized:
        outputs, inputs = (int(n) for n in parts("weight_shape"))
        q = unpacked(parts("weight_packed"), 1)[:outputs, :inputs] - 8
        scale, zero = parts("weight_scale"), _zero(parts, 4)
        group = parts("weight_g_idx") if "weight_g_idx" in parts else None
        if group is not None and bool((group < 0).any()):  # how "no order" is written
            group = None
        return assembled(q.t(), None if zero is None else zero.t(), scale.t(), group)

    def read(self, config: Mapping[str, Any], parts: Parts) -> Tensor:
        if self.bits(config) == 4:
            return super().read(config, parts)
        if "weight_packed" in parts:
            outputs, inputs = (int(n) for n in parts("weight_shape"))
            weight = unpacked(parts("weight_packed"), 1, 8)[:outputs, :inputs].float() - 128
        else:
            weight = parts("weight").float()
        zero = _zero(parts, 8)
        if zero is not None:
            weight = weight - spread(zero.float(), weight)
        return (weight * spread(parts("weight_scale").float(), weight)).t()


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


def spread(scale: Tensor, weight: Tensor) -> Tensor:
    """Scales, one for all, for each row, for each group of a row or each rectangle, as many as there are weights [out, in]."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        return scale[:, None]
    for axis in (0, 1):
        if scale.shape[axis] not in (1, weight.shape[axis]):
            size = -(-weight.shape[axis] // scale.shape[axis])
            size = 1 << (size - 1).bit_length() if weight.shape[axis] % scale.shape[axis] else size
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, weight.shape[axis])
    return scale


PACKING = CompressedTensors()
