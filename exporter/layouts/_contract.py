"""What a layout is: further files beside the graphs, with which another runtime loads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.graphset import GraphSet
    from profiles._schema import Profile


class Layout(ABC):
    """Makes what another runtime reads out of an exported model.

    The module's docstring says which runtime, what of it was read, and what of a model has no place there.
    """

    @abstractmethod
    def files(self, graphs: GraphSet, folder: Path, profile: Profile) -> dict[str, bytes]:
        """File name → content, to be written into `folder` in this order: what makes it a model of that runtime is last.

        Weights are those of the graphs there, by reference, so that nothing is stored twice.

        Args:
            graphs: the exported model, whose files are in `folder`. profile: what it was exported for.
        Raises:
            UsageError: the runtime has no place for something that this model needs; says for what.
            EnvironmentMismatch: a package is missing here.
        """
