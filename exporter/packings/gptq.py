"""AutoGPTQ and GPTQModel: `qweight` int32 [in / 8, out], `qzeros` int32 [groups, out / 8], `scales` [groups, out], `g_idx` [in].

Weight = scale * (q - zero). `checkpoint_format` "gptq" (also where it is not named) holds zero - 1, "gptq_v2" holds zero. With
`desc_act` the input channels of a group are scattered: `g_idx` says which group each belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.errors import CheckpointError
from exporter.packings._contract import Packing, Parts, assembled, unpacked

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.quantize._contract import Quantized

BEFORE = {"gptq": 1, "gptq_v2": 0}
"""What has to be added to a stored zero."""


class Gptq(Packing):
    marker = ("qweight",)

    def check(self, config: Mapping[str, Any]) -> None:
        bits, layout = _bits(config), _layout(config)
        if bits not in (4, 8) or layout not in BEFORE:
            raise CheckpointError(
                f'This GPTQ checkpoint has {bits} bits in format "{layout}". Read are 4 and 8 bits in {" and ".join(BEFORE)}.'
            )

    def numbers(self, config: Mapping[str, Any], parts: Parts) -> str | None:
        return "int4" if _bits(config) == 4 else None

    def quantized(self, config: Mapping[str, Any], parts: Parts) -> Quantized:
        q, zero = unpacked(parts("qweight"), 0), unpacked(parts("qzeros"), 1)
        group = parts("g_idx") if "g_idx" in parts else None
        return assembled(q - 8, zero - 8 + BEFORE[_layout(config)], parts("scales"), group)

    def read(self, config: Mapping[str, Any], parts: Parts) -> Tensor:
        bits = _bits(config)
        q, zero = unpacked(parts("qweight"), 0, bits).float(), unpacked(parts("qzeros"), 1, bits).float()
        scale = parts("scales").float()
        if "g_idx" in parts:
            group = parts("g_idx").long()
        else:
            import torch

            group = torch.arange(len(q)) // (len(q) // len(scale))
        return scale[group] * (q - zero[group] - BEFORE[_layout(config)])


def _bits(config: Mapping[str, Any]) -> int:
    return int(config.get("bits", 4))


def _layout(config: Mapping[str, Any]) -> str:
    return str(config.get("checkpoint_format") or "gptq")


PACKING = Gptq()
