"""The layers of an engine in groups: by the module or reduction that they compute, and by operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile

from exporter.backends._contract import Layer
from exporter.report._data import Layers

SHOWN = 1000
"""Layers of one engine that the page lists."""
DEPTH = 4
"""Names of a module's path that tell groups apart."""
RUNTIMES_OWN = "(the runtime's own)"


@dataclass(frozen=True)
class Group:
    """ms: None where the layers have no times."""

    name: str
    layers: int
    ms: float | None


def by_module(layers: Iterable[Layer]) -> list[Group]:
    """Alike modules of all layers together: "layers/*/self_attn". A layer that computes several counts to the first of them."""
    return _groups(layers, lambda layer: _module(layer.scopes[0]) if layer.scopes else RUNTIMES_OWN)


def by_kind(layers: Iterable[Layer]) -> list[Group]:
    return _groups(layers, lambda layer: layer.kind or "(not told)")


def milliseconds(layers: Iterable[Layer]) -> float | None:
    """Of all together; None where one has no time."""
    times = [layer.ms for layer in layers]
    return None if None in times else sum(ms for ms in times if ms is not None)


def timed(layers: Layers) -> bool:
    """Whether any engine's layers have times."""
    return any(found and milliseconds(found) is not None for found in layers.engines.values())


def _groups(layers: Iterable[Layer], key: Callable[[Layer], str]) -> list[Group]:
    """Those that take longest first, then those of most layers."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(key(layer), []).append(layer)
    groups = [Group(name, len(those), milliseconds(those)) for name, those in found.items()]
    return sorted(groups, key=lambda g: (-(g.ms or 0.0), -g.layers, g.name))


def _module(scope: str) -> str:
    """Its path without numbers, as far as modules go: runtimes hang what they fuse below, torch's tracer what belongs to none, by
    names that begin with a capital or an underscore."""
    path = takewhile(lambda part: part[:1].islower() or part[:1].isdecimal(), scope.split("/"))
    return "/".join("*" if part.isdecimal() else part for part in list(path)[:DEPTH]) or RUNTIMES_OWN
