"""AutoAWQ, version "gemm": `qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out].

A word holds eight output channels in the order 0, 2, 4, 6, 1, 3, 5, 7, the first in its lowest bits; weight = scale * (q - zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.errors import CheckpointError
from exporter.packings._contract import Packing, Parts, assembled, unpacked

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.quantize._contract import Quantized

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word each of eight channels is."""


class Awq(Packing):
    marker = ("qweight",)

    def check(self, config: Mapping[str, Any]) -> None:
        bits, version = int(config.get("bits", 4)), str(config.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise CheckpointError(
                f'This AWQ checkpoint has {bits} bits in version "{version}". Read are 4 bits in version "gemm", which most are '
                "published in."
            )

    def numbers(self, config: Mapping[str, Any], parts: Parts) -> str:
        return "int4"

    def quantized(self, config: Mapping[str, Any], parts: Parts) -> Quantized:
        q = _columns(parts("qweight"))
        zero = _columns(parts("qzeros")) if "qzeros" in parts else None
        return assembled(q - 8, None if zero is None else zero - 8, parts("scales"))


def _columns(words: Tensor) -> Tensor:
    """int32 [n, out / 8] → int8 [n, out]"""
    found: Tensor = unpacked(words, 1).unflatten(1, (-1, 8))[:, :, list(PLACES)].flatten(1)
    return found


PACKING = Awq()
