"""Does a bundle fit a device? Asked before anything is sent, answered with everything that does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.bundle import Bundle
from profiles._schema import Profile, newer

MIB = 2**20
PYTHON = "3.10"
RUN_PEAK = 1.5
"""Memory while it runs, in weights: they, activations and cache."""
SHARE_OF_TOTAL = 0.85
"""Of the memory that a data sheet states, what Linux offers at least (an Orin Nano 8 GB: 7.4 GiB)."""


@dataclass(frozen=True)
class Need:
    """What a bundle takes, in MiB. memory: while it is built there, else while it runs."""

    send_mib: float
    disk_mib: float
    memory_mib: float
    edgetrim: bool
    """Whether anything of it is run there."""


@dataclass(frozen=True)
class Row:
    """One answer. fits: None where it is only told, as nothing can be said against it or nobody knows."""

    what: str
    found: str | None
    expected: str | None
    fits: bool | None


def need(bundle: Bundle, missing_bytes: int, builds: bool, runs: bool) -> Need:
    """Args: builds: whether engines are built there; runs: whether anything is run there."""
    from exporter.cost.roofline import BUILD_PEAK

    profile, graphs = profile_of(bundle), bundle.graphs
    weights = sum(
        int(entry["bytes"])
        for name, entry in bundle.manifest["files"].items()
        if name.startswith("graphs/") and name != f"graphs/{graphs.embedding}"
    )
    trt = profile.stack.backend == "trt"
    engines = weights if builds and trt else 0
    peak = (BUILD_PEAK.get(graphs.weights, max(BUILD_PEAK.values())) if engines else RUN_PEAK) * weights if runs else 0
    return Need(missing_bytes / MIB, (missing_bytes + 1.1 * engines) / MIB + 16, peak / MIB, runs)


def profile_of(bundle: Bundle) -> Profile:
    from exporter.job import Job
    from exporter.workspace import Workspace

    return Job.read(Workspace(bundle.folder)).loaded_profile()


def builds_there(bundle: Bundle, profile: Profile) -> bool:
    """Whether the engines are the device's to build: full TensorRT's always are, others' where the bundle has none."""
    return profile.stack.builds_on_device or "engines/engines.json" not in bundle.manifest["files"]


def check(facts: Mapping[str, Any], look: Mapping[str, Any], profile: Profile, need: Need) -> list[Row]:
    """Compare what a device says of itself (`agent.facts`, `agent.look`) with the profile and the bundle."""
    stack, memory = profile.stack, profile.memory
    rows = [
        Row("device", _text(facts, "model") or _text(facts, "machine"), profile.device.title, None),
        Row("system", _text(facts, "system"), None, None),
    ]
    if need.edgetrim:
        rows.append(_at_least("Python", _text(facts, "python"), PYTHON))
    if stack.jetpack is not None:
        rows.append(_at_least("JetPack", _text(facts, "jetpack"), stack.jetpack))
    if stack.builds_on_device and stack.tensorrt is not None:
        rows.append(_at_least("TensorRT", _text(facts, "tensorrt"), stack.tensorrt))
    if _text(facts, "driver"):
        rows.append(Row("NVIDIA driver", _text(facts, "driver"), None, None))
    total, free = _number(facts, "memory_total_mib"), _number(facts, "memory_available_mib")
    if stack.jetpack is not None and memory.total_mib is not None:
        asked = SHARE_OF_TOTAL * memory.total_mib
        rows.append(Row("memory", _mib(total), f"≥ {_mib(asked)}", None if total is None else total >= asked))
    if need.memory_mib:
        swap = _number(facts, "swap_free_mib") or 0
        enough = None if free is None else free + swap >= need.memory_mib
        found = None if free is None else f"{_mib(free)} and {_mib(swap)} of swap"
        rows.append(Row("free memory", found, f"≥ {_mib(need.memory_mib)}", enough))
    rows.append(Row("unfragmented memory", _mib(_number(facts, "unfragmented_mib")), None, None))
    disk = _number(facts, "disk_free_mib")
    rows.append(
        Row("free disk", _mib(disk), f"≥ {_mib(need.disk_mib)}", None if disk is None else disk >= need.disk_mib)
    )
    rows.append(
        Row("folder", "writable" if look.get("writable") else "not writable", "writable", bool(look.get("writable")))
    )
    if _text(facts, "power_mode"):
        rows.append(Row("power mode", _text(facts, "power_mode"), next(iter(profile.device.modes), None), None))
    if need.edgetrim:
        version = _text(facts, "edgetrim")
        rows.append(Row("edgetrim", version or "not installed", "installed", version is not None))
    return rows


def reasons(rows: list[Row]) -> list[str]:
    """What does not fit, in words."""
    return [f"{r.what}: {r.found or 'unknown'}, expected {r.expected}" for r in rows if r.fits is False]


def _at_least(what: str, found: str | None, oldest: str) -> Row:
    return Row(what, found or "none found", f"≥ {oldest}", found is not None and newer(found, oldest))


def _text(facts: Mapping[str, Any], key: str) -> str | None:
    from exporter.deploy.ssh import printable

    return None if facts.get(key) is None else printable(str(facts[key]))[:120]


def _number(facts: Mapping[str, Any], key: str) -> float | None:
    found = facts.get(key)
    return float(found) if isinstance(found, int | float) else None


def _mib(mib: float | None) -> str | None:
    if mib is None:
        return None
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"
