"""The build recipe of a bundle whose engines are the device's to build: what to run there, what it takes, what comes out."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from exporter.backends._onnx_file import external_files
from exporter.cost.roofline import BUILD_PEAK
from exporter.graphset import GraphSet
from exporter.stages.build import built_from, shape_profiles
from exporter.workspace import Workspace
from profiles._schema import Profile

RECIPE, PAGE = "recipe.json", "BUILD.md"


def write(work: Workspace, graphs: GraphSet, profile: Profile) -> None:
    """Write recipe.json and BUILD.md."""
    recipe = collect(work, graphs, profile)
    work.write(RECIPE, json.dumps(recipe, indent=1) + "\n")
    work.write(PAGE, page(recipe))


def collect(work: Workspace, graphs: GraphSet, profile: Profile) -> dict[str, Any]:
    """The recipe as data. Bytes of graphs count their weights; a file that several share counts for each."""
    engines: list[dict[str, Any]] = []
    for file, roles in graphs.roles().items():
        path = work.graphs / built_from(file, graphs, profile)
        size = path.stat().st_size + sum(weights.stat().st_size for weights in external_files(path).values())
        shapes = {found.name: asdict(found)["inputs"] for found in shape_profiles(roles, graphs, profile.limits)}
        engines.append(
            {
                "roles": list(roles),
                "graph": f"graphs/{path.name}",
                "engine": f"engines/{path.stem}.engine",
                "graph_bytes": size,
                "build_peak_mib": round(
                    BUILD_PEAK[graphs.weights if "decode" in roles or "prefill" in roles else "none"] * size / 2**20
                ),
                "optimization_profiles": shapes,
            }
        )
    stack = profile.stack
    return {
        "schema": 1,
        "command": ["edgetrim", "run", "."],
        "profile": profile.name,
        "device": profile.device.title,
        "needs": {
            "module": stack.module,
            "tensorrt": stack.tensorrt,
            "jetpack": stack.jetpack,
            "compute_capabilities": list(stack.compute_capabilities),
            "memory_mib": max(entry["build_peak_mib"] for entry in engines),
            "disk_mib": round(sum(entry["graph_bytes"] for entry in engines) / 2**20) + 1,
        },
        "engines": engines,
    }


def page(recipe: dict[str, Any]) -> str:
    """The recipe for people."""
    needs, rows = recipe["needs"], recipe["engines"]
    targets = ", ".join(f"SM {c / 10:.1f}" for c in needs["compute_capabilities"])
    stack = f"`{needs['module']}` {needs['tensorrt']} or newer"
    if needs["jetpack"]:
        stack += f", as JetPack {needs['jetpack']} brings it"
    table = "\n".join(
        f"| {' and '.join(e['roles'])} | `{e['graph']}` | `{e['engine']}` | {e['graph_bytes'] / 2**20:,.0f} MiB | about {e['build_peak_mib']:,} MiB |"
        for e in rows
    )
    return f"""# Building the engines

This bundle holds graphs for {recipe["device"]} (`{recipe["profile"]}`). TensorRT builds an engine for one version and GPU, so
the device builds its own, from this folder alone: no PyTorch, no network.

```
pip install edgetrim      # without extras; in an environment that sees the system's TensorRT (--system-site-packages)
{" ".join(recipe["command"])}
```

That builds the engines, compares them with what the model gave where it was exported, times every stage and packs the bundle anew;
`edgetrim build .` only builds.

It needs {stack}, a GPU of {targets}, about {needs["memory_mib"]:,} MiB of memory for the largest engine (swap counts) and
{needs["disk_mib"]:,} MiB of disk. The files are compared with `manifest.json` first. An engine that is built already is taken from
the cache.

| role | from | makes | size | peak memory |
|---|---|---|---|---|
{table}

`recipe.json` has the same for programs, with the shapes of every optimization profile.
"""
