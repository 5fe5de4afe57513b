"""What a flavour is: a pass over the language model's plain graphs, for one runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

CAPACITY = "capacity"
"""How the name of an axis begins along which an input may be longer than what it holds."""

LAST, PLACES, COS, SIN, LENGTH, TOTAL = "last", "places", "cos_", "sin_", "length_", "total_"
"""Inputs of a graph that appends to its cache in place, see `exporter.flavours.ort`; COS and SIN before a number, the latter two
before a KV group's name."""

ANGLES = "angles"
"""Key in the metadata of such a graph: an ONNX model of its own, base64, from `position_ids` to COS and SIN [tokens, head_dim / 2]."""


class Refused(Exception):
    """A graph is not what the flavour takes; the message says why. The plain graphs are run then."""


class Flavour(ABC):
    """Rewrites graphs. Run by the backend's runner, they take and give what the plain ones do.

    The module's docstring says what the pass requires of the plain graphs and what it ensures of the new ones.
    """

    backend: str
    """The only backend that runs what comes out."""
    places_shared: bool = True
    """Whether two tokens of a row may have the same `order`."""

    @abstractmethod
    def rewrite(self, model: ir.Model) -> None:
        """Rewrite a graph in place.

        Raises:
            Refused: the model is then half rewritten; throw it away.
        """
