"""Work as data: what `count` finds and `roofline` reads. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BITS = {"int4": 4, "int8": 8, "fp8": 8, "nvfp4": 4}
"""Of a weight without its scales, by what [precision] calls it."""


@dataclass(frozen=True)
class Operator:
    """One product, and how many alike there are.

    flops: a multiply and an add are two. weight_bytes: read of weights, as they are stored. moved_bytes: activations read and
    written, keys and values among them. score_bytes: attention scores written or read, which fused attention keeps to itself.
    All of one.
    """

    kind: Literal["matrix", "convolution", "attention"]
    flops: int
    weight_bytes: int
    moved_bytes: int
    score_bytes: int
    count: int = 1


@dataclass(frozen=True)
class Stage:
    """vision, question, reduce, prefill, or one step of decode."""

    name: str
    operators: tuple[Operator, ...]

    @property
    def flops(self) -> int:
        return sum(op.count * op.flops for op in self.operators)


@dataclass(frozen=True)
class Engine:
    """What is loaded as one. activation_bytes: alive at once, scores left out. largest: its largest weight. widest_bytes: of its largest
    quantised matrix, as the floats that it stands for; 0 where none is quantised."""

    name: str
    roles: tuple[str, ...]
    weight_bytes: int
    activation_bytes: int
    largest: str
    largest_bytes: int
    widest_bytes: int = 0


@dataclass(frozen=True)
class Work:
    """cache: bytes of every tensor that a conversation holds, at its longest."""

    stages: tuple[Stage, ...]
    engines: tuple[Engine, ...]
    cache: tuple[int, ...]

    def stage(self, name: str) -> Stage:
        return next(s for s in self.stages if s.name == name)
