"""Atoms: modules whose graph is traced once and stamped wherever the same atom appears again.

A tower or decoder is written as plain Python over atoms: its `forward` calls atoms and nothing else. Called with tensors it
computes; called with graph values inside a `Sheet` (see `exporter.stages._draw`) it draws, one traced layer stamped for
every layer of the model. So export time does not grow with depth, and there is one forward, not two.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from contextvars import ContextVar
from typing import Any, Protocol

from torch import nn


class Sheet(Protocol):
    """Where atoms are drawn."""

    def draw(self, atom: Atom, args: tuple[Any, ...]) -> Any: ...


SHEET: ContextVar[Sheet | None] = ContextVar("sheet", default=None)
"""The sheet being drawn on, or None: compute."""


class Atom(nn.Module):
    """A module that takes tensors (or None) by position and returns a tensor or a tuple of tensors."""

    @abstractmethod
    def key(self) -> Hashable:
        """Equal for atoms that trace to the same graph, up to the values of their weights."""

    def __call__(self, *args: Any) -> Any:
        sheet = SHEET.get()
        return super().__call__(*args) if sheet is None else sheet.draw(self, args)
