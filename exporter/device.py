"""The machine: what it is (`facts`), how it is at the moment (`state`).

Two latencies compare only where the facts are equal. What a machine does not have, or does not tell, is not among them. Everything
is read from files, and a GPU's from nvidia-smi; nothing needs root, and nothing here fails.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from exporter import __version__

ROOT = Path("/")
RUNTIMES = ("onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13")
"""Packages whose version decides how fast the same graph is."""
SMI = ("nvidia-smi", "--format=csv,noheader,nounits")
SMI_FACTS = {"name": "GPU", "compute_cap": "SM", "driver_version": "driver", "power.limit": "GPU power limit (W)"}
SMI_TIMEOUT_S = 20


def facts(root: Path = ROOT) -> dict[str, str]:
    """What decides how fast the machine is, by name, in words: processor, module, GPU, driver, JetPack, power mode, clocks, runtimes."""
    found: dict[str, str | None] = {
        "processor": processor(root),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "module": _read(root / "proc/device-tree/model"),
        "JetPack": _package(root, "nvidia-jetpack"),
        "L4T": _l4t(root),
        "power mode": _power_mode(root),
        "CPU clocks": _clocks(sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*")), "scaling_", 1e3),
        "GPU clocks": _clocks(_gpu_folders(root), "", 1e6),
        **_smi(),
        "TensorRT of the system": _package(root, "libnvinfer10") or _package(root, "libnvinfer11"),
        **{name: _version(name) for name in RUNTIMES},
    }
    return {name: value for name, value in found.items() if value}


def state(root: Path = ROOT) -> dict[str, float]:
    """What changes from one measurement to the next: load average, hottest sensor, clock of the first processor."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError, AttributeError):
        found["load"] = round(os.getloadavg()[0], 2)
    degrees = [_number(zone / "temp") for zone in (root / "sys/class/thermal").glob("thermal_zone*")]
    if real := [t / 1e3 for t in degrees if t is not None and 0 < t < 150e3]:
        found["temperature_c"] = round(max(real), 1)
    if clock := _number(root / "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq"):
        found["clock_mhz"] = round(clock / 1e3)
    return found


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is not the same, in words: "driver 540.4 → 550.1". Empty where all is."""
    names = dict.fromkeys([*before, *now])
    return [f"{n} {before.get(n, 'none')} → {now.get(n, 'none')}" for n in names if before.get(n) != now.get(n)]


def machine() -> dict[str, Any]:
    """What measured, for a record: processor, cores, load, and the time."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def processor(root: Path = ROOT) -> str:
    """Its name as Linux knows it, else the architecture's."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> str | None:
    """A small text file; device trees end theirs with a zero byte. None where there is nothing to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(_read(path) or "")
    except ValueError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package(root: Path, name: str) -> str | None:
    """Version of an installed Debian package."""
    listed = _read(root / "var/lib/dpkg/status") or ""
    entry = re.search(rf"^Package: {re.escape(name)}\n(?:\S.*\n|[ \t].*\n)*?Version: (\S+)", listed, re.M)
    return entry[1] if entry else None


def _l4t(root: Path) -> str | None:
    """ "36.4.3" of "# R36 (release), REVISION: 4.3, …"."""
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release") or "")
    return f"{found[1]}.{found[2]}" if found else None


def _power_mode(root: Path) -> str | None:
    """A Jetson's, by its name: nvpmodel writes the number into `status`, the names stand in its configuration."""
    status = re.search(r"pmode:0*(\d+)", _read(root / "var/lib/nvpmodel/status") or "")
    if status is None:
        return None
    names = _read(root / "etc/nvpmodel.conf") or ""
    named = re.search(rf"^\s*<\s*POWER_MODEL\s+ID={status[1]}\s+NAME=(\S+?)\s*>", names, re.M)
    return named[1] if named else f"mode {status[1]}"


def _gpu_folders(root: Path) -> list[Path]:
    """Those of a Jetson's GPU."""
    return sorted(p for p in (root / "sys/class/devfreq").glob("*") if re.search(r"gpu|g[av]1\db", p.name))


def _clocks(folders: Iterable[Path], prefix: str, per_mhz: float) -> str | None:
    """ "schedutil 729–1728 MHz"; one number where the clock is locked."""
    found = []
    for folder in folders:
        low, high = _number(folder / f"{prefix}min_freq"), _number(folder / f"{prefix}max_freq")
        if low is None or high is None:
            continue
        span = f"{high / per_mhz:.0f}" if low == high else f"{low / per_mhz:.0f}–{high / per_mhz:.0f}"
        governor = _read(folder / f"{prefix}governor")
        found.append(f"{governor} {span} MHz" if governor else f"{span} MHz")
    return ", ".join(dict.fromkeys(found)) or None


def _smi() -> dict[str, str | None]:
    """Of the GPUs that nvidia-smi knows; several are joined by commas. What it calls N/A is left out."""
    program = shutil.which(SMI[0])
    if program is None:
        return {}
    try:
        done = subprocess.run(
            [program, *SMI[1:], f"--query-gpu={','.join(SMI_FACTS)}"],
            capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    columns = zip(*(row for row in rows if len(row) == len(SMI_FACTS)), strict=True)
    found: dict[str, str | None] = {}
    for name, cells in zip(SMI_FACTS.values(), columns, strict=False):
        known = [cell for cell in cells if cell and "N/A" not in cell and not cell.startswith("[")]
        found[name] = ", ".join(dict.fromkeys(known)) + (f" ({len(known)}×)" if len(known) > 1 else "")
    return found


def versions() -> dict[str, str]:
    """Installed versions of what shaped the result."""
    found = {"edgetrim": __version__}
    for name in (
        "torch",
        "transformers",
        "onnx",
        "onnxruntime-gpu",
        "onnxruntime",
        "tensorrt-rtx-cu13",
        "tensorrt",
        "numpy",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
