"""Writes graphs with plugins beside the plain ones, which stay the graphs of record. Weights are shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from plugins._contract import DOMAIN, SUFFIX, VERSION, Found, Plugin

if TYPE_CHECKING:
    import onnx_ir as ir


def apply(names: Sequence[str], folder: Path, files: Iterable[str], log: Callable[[str], None]) -> dict[str, str]:
    """Plain graph → the graph with plugins in it, a new file; only where something was replaced.

    Args:
        names: of plugins. files: plain graphs, in `folder`.
    """
    import onnx_ir as ir

    written: dict[str, str] = {}
    counts = dict.fromkeys(names, 0)
    for file in dict.fromkeys(files):
        model = ir.load(folder / file)
        here = {name: replace(model, name, load(name)) for name in names}
        if any(here.values()):
            written[file] = f"{Path(file).stem}{SUFFIX}.onnx"
            ir.save(model, folder / written[file])
        counts = {name: counts[name] + here[name] for name in names}
    for name, count in counts.items():
        log(
            f"plugin {name}: {count} nodes"
            if count
            else f"warning: plugin {name} has nothing to replace in these graphs"
        )
    return written


def load(name: str) -> Plugin:
    """The plugin of a module of this folder."""
    found: Plugin = import_module(f"plugins.{name}").PLUGIN
    return found


def replace(model: ir.Model, name: str, plugin: Plugin) -> int:
    """Put a plugin's node in the place of all that it replaces. Returns how many there are."""
    from onnx_ir.passes import common

    found = list(plugin.find(model.graph))
    for number, subgraph in enumerate(found, 1):
        _put(model.graph, name, plugin, subgraph, number)
    if found:
        model.graph.opset_imports[DOMAIN] = int(VERSION)
        common.RemoveUnusedNodesPass()(model)
        model.graph.sort()
    return len(found)


def _put(graph: ir.Graph, name: str, plugin: Plugin, found: Found, number: int) -> None:
    import onnx_ir as ir

    assert set(found.attributes) == set(plugin.attributes), found.attributes
    scope = next((n.name or "" for n in [found.outputs[0].producer()] if n is not None), "").rpartition("/")[0]
    outputs = [ir.Value(name=f"{name}_{number}_{i}", shape=v.shape, type=v.type) for i, v in enumerate(found.outputs)]
    attributes: dict[str, int | str] = {k: found.attributes[k] for k in plugin.attributes}
    # what TensorRT's parser looks the plugin up by
    attributes |= {"plugin_version": VERSION, "plugin_namespace": DOMAIN}
    node = ir.Node(
        DOMAIN, name, found.inputs, [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()],
        outputs=outputs, name=f"{scope}/{name}_{number}" if scope else f"{name}_{number}",
    )  # fmt: skip
    graph.append(node)
    for old, new in zip(found.outputs, outputs, strict=True):
        if old.is_graph_output():
            old.name, new.name = f"{old.name}_plain", old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
