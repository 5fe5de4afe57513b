"""What an accounting is: a published way to reckon a language model, reproduced with what is odd about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.cost.work import BITS
from exporter.errors import UsageError
from exporter.nn.specs import DecoderShape

if TYPE_CHECKING:
    from exporter.plan import Plan


@dataclass(frozen=True)
class Bits:
    """Of a weight, an activation, and a key or value in the cache."""

    weight: int
    activation: int
    cache: int


@dataclass(frozen=True)
class Rates:
    """bandwidth: bytes a second. wide, narrow: operations a second at 16 bits and at 8."""

    bandwidth: float
    wide: float
    narrow: float


@dataclass(frozen=True)
class Reckoned:
    """A stage: its operations, the bytes it reads and writes, its seconds, and the bytes of memory it takes."""

    operations: float
    moved: float
    seconds: float
    memory: float


class Accounting(ABC):
    source: str
    """Where it is published."""
    differs: str
    """What it counts otherwise than we do, in a sentence or two."""

    @abstractmethod
    def prefill(self, spec: DecoderShape, tokens: Sequence[int], bits: Bits, rates: Rates) -> Reckoned:
        """`tokens`: how many enter each layer."""

    @abstractmethod
    def decode(self, spec: DecoderShape, tokens: Sequence[int], bits: Bits, rates: Rates) -> Reckoned:
        """One token; `tokens`: how many each layer's cache holds."""

    def answer_s(
        self, spec: DecoderShape, prompt: Sequence[int], cached: Sequence[int], new_tokens: int, bits: Bits, rates: Rates
    ) -> float:  # fmt: skip
        """Seconds from the prompt to the last of `new_tokens`. `cached`: what each layer's cache holds behind prefill."""
        steps = (self.decode(spec, [n + i for n in cached], bits, rates).seconds for i in range(new_tokens))
        return self.prefill(spec, prompt, bits, rates).seconds + sum(steps)


def reckon(accounting: Accounting, plan: Plan, text: int, new_tokens: int) -> dict[str, Reckoned]:
    """A plan's prefill, and its decode in the middle of the answer.

    Raises:
        UsageError: the plan's profile does not know what an accounting needs.
    """
    mode, precision = plan.profile.mode, plan.profile.precision
    wide = mode.fp32_tflops if precision.compute == "fp32" else mode.fp16_tflops
    if wide is None or mode.bandwidth_gb_s is None:
        raise UsageError(
            f"--accounting: profile `{plan.profile.name}` does not say how fast {plan.profile.device.title} computes and what its "
            "bandwidth is. Take another, or one of your own."
        )
    rates = Rates(mode.bandwidth_gb_s * 1e9, wide * 1e12, (mode.int8_tops or wide) * 1e12)
    whole = 32 if precision.compute == "fp32" else 16
    bits = Bits(BITS.get(precision.weights, whole), whole, whole)
    spec = plan.family.decoder(plan.checkpoint)
    cached = [kept + text + new_tokens // 2 for kept in plan.kv.cached]
    return {
        "prefill": accounting.prefill(spec, [kept + text for kept in plan.kv.entering], bits, rates),
        "decode": accounting.decode(spec, cached, bits, rates),
    }
