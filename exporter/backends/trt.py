"""TensorRT: engines from the plain graphs, by `tensorrt` (10.3 and newer) or `tensorrt_rtx`, in one code path.

Options of `build`:

==================== ================================================================================================
module               "tensorrt" or "tensorrt_rtx"; without it, whichever is installed (`tensorrt` first)
compute_capabilities GPUs to build for, e.g. [80, 86, 89, 120]; TensorRT-RTX only, default: portable from Ampere on
workspace_mib        limit of the builder's scratch memory
strip_weights        True: engines without weights, which the runner takes from the graph when it opens them. So a bundle holds
                     the weights once, and engines that share a weight file do not repeat it
==================== ================================================================================================

`tensorrt_rtx` builds ahead of time on a machine without a GPU; it knows neither Jetson Orin (SM 87) nor Hopper (SM 90). `tensorrt`
builds on the device itself. Neither gives the same bytes every time.

Engines run wherever there is a GPU and the module they were built with (`_trt_runner`). An engine is code: open only those
of a bundle that you trust, and whose hashes are right.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import exporter
from exporter import errors
from exporter.backends import _cuda, _engine_cache, _plugins, _trt_module, _trt_worker
from exporter.backends._contract import Backend, EngineRecord, Log, Range, Runner, ShapeProfile
from exporter.backends._device_memory import size_class
from exporter.backends._engine_cache import EngineCache
from exporter.backends._onnx_file import external_files
from exporter.backends._trt_runner import TensorRtRunner
from exporter.bundle import sha256
from exporter.errors import EnvironmentMismatch, ExportError, UsageError, nearest

MODULES = ("tensorrt", "tensorrt_rtx")
OPTIONS = ("module", "compute_capabilities", "workspace_mib", "strip_weights")
WORKER: tuple[str, ...] = ("-m", "exporter.backends._trt_worker")
KEPT_LINES = 12
"""Log lines shown when the builder's process dies."""


@dataclass(frozen=True)
class Options:
    module: str
    compute_capabilities: list[int] | None
    workspace_mib: int | None
    strip_weights: bool


class TensorRT(Backend):
    """Builds engines in a process of their own, because the ONNX parser can crash."""

    name = "trt"

    def missing(self) -> str | None:
        if any(map(_installed, MODULES)):
            return None
        hints = " ".join(map(_how, MODULES))
        return f"Neither Python module `tensorrt` nor `tensorrt_rtx` is installed. {hints}"

    def missing_to_run(self) -> str | None:
        if missing := self.missing():
            return missing
        if gpu := _cuda.missing():
            return f"TensorRT engines run on an NVIDIA GPU, and this machine has {gpu}."
        return None

    def holds(self, cache: Sequence[int]) -> int:
        """Two buffers of the pool per tensor, see `_device_memory`, and one of each size, from which one tensor after another moves on to
        more slots."""
        sizes = [size_class(size) for size in cache]
        return 2 * sum(sizes) + sum(set(sizes))

    def build(
        self, graph: Path, roles: tuple[str, ...], profiles: Sequence[ShapeProfile], out: Path,
        options: Mapping[str, Any], log: Log,
    ) -> EngineRecord:  # fmt: skip
        """Build `out/<graph's stem>.engine`. On failure, and on Ctrl-C, nothing of it stays behind."""
        chosen = _options(options)
        if not graph.is_file():
            raise ExportError(f"There is no graph {graph}. Run export first.")
        _warn_of_double_weights(profiles, log)
        out.mkdir(parents=True, exist_ok=True)
        target = out / f"{graph.stem}.engine"
        with tempfile.TemporaryDirectory(prefix=f".{graph.stem}-", suffix=".tmp", dir=out) as scratch:
            facts, cached = _made(graph, profiles, chosen, Path(scratch), log)
            engine = Path(scratch, "engine")
            digest, size = sha256(engine), engine.stat().st_size
            os.replace(engine, target)
        build_s, peak_rss_mib = facts.pop("build_s"), facts.pop("peak_rss_mib")
        if plugins := _plugins.needed(graph):
            facts["plugins"] = plugins["sha256"]
        details = {
            **facts,
            "compute_capabilities": chosen.compute_capabilities,
            "stripped": chosen.strip_weights,
            "cached": cached,
        }
        return EngineRecord(roles, target.name, digest, size, build_s, peak_rss_mib, self.name, details)

    def runner(
        self, engine: Path, threads: int | None = None, repeats: bool = False, graph: Path | None = None,
        profiled: bool = False,
    ) -> Runner:  # fmt: skip
        if missing := self.missing_to_run():
            raise EnvironmentMismatch(f"{engine.name} cannot be run here. {missing}")
        return TensorRtRunner(engine, graph)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _how(module: str) -> str:
    """How to get a module on this machine."""
    if module == "tensorrt_rtx":
        return "TensorRT-RTX (x86-64, builds without a GPU): `pip install tensorrt-rtx-cu13`."
    if platform.machine() == "aarch64":
        return (
            "TensorRT comes with JetPack: `sudo apt install python3-libnvinfer`, and a virtual environment made with "
            "`--system-site-packages`."
        )
    return "TensorRT (needs the GPU it builds for): `pip install tensorrt`."


def _options(options: Mapping[str, Any]) -> Options:
    """Check the options, and that the module is there."""
    for key in options:
        if key not in OPTIONS:
            raise UsageError(f"Backend trt has no option '{key}'. {nearest(key, OPTIONS)}")
    module = options.get("module") or next(filter(_installed, MODULES), MODULES[0])
    if module not in MODULES:
        raise UsageError(f"Backend trt has no module '{module}'. {nearest(str(module), MODULES)}")
    if not _installed(module):
        raise EnvironmentMismatch(f"Python module `{module}` is not installed. {_how(module)}")
    capabilities = options.get("compute_capabilities")
    if capabilities is not None and not (
        isinstance(capabilities, list | tuple) and capabilities and all(map(_whole, capabilities))
    ):
        raise UsageError(f"Option compute_capabilities is {capabilities!r}; expected a list such as [80, 86, 89, 120].")
    workspace = options.get("workspace_mib")
    if workspace is not None and not (_whole(workspace) and workspace > 0):
        raise UsageError(f"Option workspace_mib is {workspace!r}; expected a whole number of MiB, such as 2048.")
    strip = options.get("strip_weights", False)
    if not isinstance(strip, bool):
        raise UsageError(f"Option strip_weights is {strip!r}; expected true or false.")
    if strip and module == "tensorrt_rtx" and (gpu := _cuda.missing()):
        raise EnvironmentMismatch(
            f"TensorRT-RTX builds engines without weights only where there is a GPU, and this machine has {gpu}. Leave out "
            "--strip-weights, or build on the RTX machine."
        )
    return Options(module, None if capabilities is None else sorted(set(capabilities)), workspace, strip)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _warn_of_double_weights(profiles: Sequence[ShapeProfile], log: Log) -> None:
    """A decode profile fixed at one token beside a ranged prefill stores FP16 weights twice (686 → 1232 MB, RTX 1.7.1).

    The token axis is axis 1 of `inputs_embeds`; a fixed past length does no harm.
    """
    spans = {}
    for profile in profiles:
        axes = profile.inputs.get("inputs_embeds", ())
        if len(axes) > 1:
            low, _, high = _triple(axes[1])
            spans[profile.name] = (low, high)
    fixed = [name for name, span in spans.items() if span == (1, 1)]
    if fixed and any(low < high for low, high in spans.values()):
        log(f"[W] Shape profile '{fixed[0]}' fixes seq at 1: FP16 weights are then stored twice. Use the range 1 to 4.")


def _triple(axis: Range | int) -> tuple[int, int, int]:
    return (axis, axis, axis) if isinstance(axis, int) else (axis.min, axis.opt, axis.max)


def _request(graph: Path, profiles: Sequence[ShapeProfile], chosen: Options) -> dict[str, Any]:
    """What the worker is asked for, but for the graph."""
    return {
        "profiles": [
            {
                "name": p.name,
                "inputs": {
                    name: [axis if isinstance(axis, int) else list(_triple(axis)) for axis in axes]
                    for name, axes in p.inputs.items()
                },
            }
            for p in profiles
        ],
        "module": chosen.module,
        "compute_capabilities": chosen.compute_capabilities,
        "workspace_mib": chosen.workspace_mib,
        "strip_weights": chosen.strip_weights,
        "plugins": _plugins.needed(graph),
    }


def _parts(graph: Path, profiles: Sequence[ShapeProfile], chosen: Options) -> dict[str, Any]:
    """Everything an engine depends on: graph and weights, what is asked for, our builder, TensorRT, and the machine where that one
    builds for it."""
    weights = {name: sha256(path) for name, path in external_files(graph).items()}
    return {
        "graph": sha256(graph),
        "weights": weights,
        "request": _request(graph, profiles, chosen),
        "builder": sha256(Path(_trt_worker.__file__)),
        "version": _trt_module.load(chosen.module).__version__,
        "machine": [platform.system(), platform.machine(), *_built_for(chosen)],
    }


def _built_for(chosen: Options) -> list[Any]:
    """The GPU and driver that full TensorRT builds for; TensorRT-RTX needs none."""
    if chosen.module != "tensorrt" or _cuda.missing():
        return []
    return list(astuple(_cuda.first_gpu()))


def _made(
    graph: Path, profiles: Sequence[ShapeProfile], chosen: Options, scratch: Path, log: Log
) -> tuple[dict[str, Any], bool]:
    """`scratch/engine`, from the cache or built. Returns the builder's facts, and whether it was built before."""
    cache, engine = EngineCache.default(), scratch / "engine"
    if cache is None:
        return _work(graph, profiles, chosen, scratch, None, log), False
    key = _engine_cache.key(_parts(graph, profiles, chosen))
    if (facts := cache.fetch(key, engine)) is not None:
        log(f"{graph.name}: built before, taken from {cache.folder}")
        return facts, True
    facts = _work(graph, profiles, chosen, scratch, cache, log)
    cache.store(key, engine, sha256(engine), facts)
    return facts, False


def _work(
    graph: Path, profiles: Sequence[ShapeProfile], chosen: Options, scratch: Path, cache: EngineCache | None, log: Log
) -> dict[str, Any]:
    """Run the worker, which writes `scratch/engine`. Returns its facts, or raises what it reports or died of."""
    request = {"graph": str(graph.absolute()), **_request(graph, profiles, chosen)}
    (scratch / "request.json").write_text(json.dumps(request))
    timings = None
    if cache is not None and chosen.module == "tensorrt":  # TensorRT-RTX times nothing
        machine = {"version": _trt_module.load(chosen.module).__version__, "gpu": _built_for(chosen)}
        timings = f"{_engine_cache.key(machine)}.timings"
        (scratch / _trt_worker.TIMINGS).write_bytes(cache.recall(timings))
    code, last = _run(scratch, log)
    result = scratch / "result.json"
    answer: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    if code != 0 or not answer:
        raise ExportError(_death(graph, chosen.module, code, last))
    if cache is not None and timings is not None:
        cache.learn(timings, (scratch / _trt_worker.TIMINGS).read_bytes())
    if chosen.module == "tensorrt_rtx":
        check_rtx_header(scratch / "engine")
    return answer


def _run(scratch: Path, log: Log) -> tuple[int, list[str]]:
    """Run the worker, hand its lines to `log`, return its exit code and last lines. It never outlives this call."""
    last: deque[str] = deque(maxlen=KEPT_LINES)
    process = subprocess.Popen(
        [sys.executable, *WORKER, str(scratch.absolute()), str(os.getpid())],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        cwd=Path(exporter.__file__).parents[1],  # `-m` finds this very package, whatever folder the user is in
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip())
            log(line.rstrip())
        return process.wait(), list(last)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _death(graph: Path, module: str, code: int, last: Sequence[str]) -> str:
    """What to say when the worker left no result."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        how = f"was ended by {name} (signal {-code})"
    else:
        how = f"stopped with exit code {code} and no result"
    if code == -signal.SIGKILL:
        hint = (
            "The system most likely ran out of memory: a build needs 3 to 3.5 times the weights (INT4: 5 times). "
            "Free memory, add swap, or export INT4."
        )
    elif code < 0:
        hint = (
            "Its ONNX parser or builder crashed on this graph. Check the graph with a CPU profile, or try another "
            "TensorRT version."
        )
    else:
        hint = f"Try `{sys.executable} -c 'import {module}'` to see whether the module itself loads."
    lines = "\n".join(f"  {line}" for line in last) or "  (none)"
    return f"{graph.name}: the process that builds with {module} {how}. {hint}\nIts last lines:\n{lines}"


def check_rtx_header(engine: Path) -> None:
    """Check what TensorRT-RTX 1.x writes first: magic `vtrt`, the file's size at byte 16, its version at byte 24.

    Without a GPU an engine cannot be opened, so this is all that tells a whole engine from a torn one.
    """
    with open(engine, "rb") as f:
        header = f.read(64)
    size = engine.stat().st_size
    if len(header) < 64 or header[:4] != b"vtrt":
        raise ExportError(
            f"{engine.name} is no TensorRT-RTX engine: it starts with {header[:4]!r}, expected b'vtrt'. Build it again."
        )
    if (stated := int.from_bytes(header[16:24], "little")) != size:
        raise ExportError(
            f"{engine.name} is torn: its header states {stated} bytes, the file has {size}. Build it again."
        )


BACKEND = TensorRT()
