"""Makes a layout, and writes it beside the graphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import exporter.layouts
from exporter import _discover
from exporter.workspace import write_bytes

if TYPE_CHECKING:
    from exporter.graphset import GraphSet
    from exporter.layouts._contract import Layout
    from profiles._schema import Profile


def made(name: str, graphs: GraphSet, folder: Path, profile: Profile) -> dict[str, bytes]:
    """The files of a layout, see `Layout.files`.

    Raises:
        UsageError: there is no such layout. And what that raises.
    """
    layout: Layout = _discover.load(exporter.layouts, "layout", name).LAYOUT
    return layout.files(graphs, folder, profile)


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write them into the graphs' folder, in their order, each beside its place and renamed."""
    for name, content in files.items():
        write_bytes(folder / name, content)
