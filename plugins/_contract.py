"""What a plugin is: one node in place of a subgraph that works in plain ONNX."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

DOMAIN = "edgetrim"
"""Of the ONNX nodes, and TensorRT's plugin namespace."""

VERSION = "1"

SUFFIX = ".plugins"
"""How the name of a graph with plugins in it, and of its engine, ends before the extension."""


@dataclass(frozen=True)
class Found:
    """A subgraph in a graph: what goes in, and what comes out, in the order of the plugin's node."""

    inputs: Sequence[ir.Value]
    outputs: Sequence[ir.Value]
    attributes: Mapping[str, int]


@dataclass(frozen=True)
class Case:
    """Shapes to test and to time with. inputs: name of a kind → shape; "score" and "metric", "size" are float32, "index" is int64
    and ascending, all others are values."""

    inputs: Sequence[tuple[str, tuple[int, ...]]]
    attributes: Mapping[str, int]


class Plugin(ABC):
    """`PLUGIN` of a module that is named like its operator. The module's docstring says what the node takes and returns.

    Importing one imports neither torch nor onnx.
    """

    summary: str
    attributes: Sequence[str]
    """Integers, in the order in which the kernels take them."""
    cases: Sequence[Case]

    @abstractmethod
    def eager(self, inputs: Sequence[Tensor], attributes: Mapping[str, int]) -> list[Tensor]:
        """What the node computes, by the project's own blocks: traced, this is the subgraph that it replaces."""

    @abstractmethod
    def find(self, graph: ir.Graph) -> Iterable[Found]:
        """All such subgraphs in a graph, none of which shares an output with another."""
