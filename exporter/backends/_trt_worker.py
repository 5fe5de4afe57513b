"""Builds one engine, alone in its process: `python -m exporter.backends._trt_worker FOLDER PARENT`.

FOLDER holds request.json; the engine and result.json are written there. PARENT is the process id of whoever asks.

A process of its own because TensorRT's ONNX parser can crash (nested local functions: segfault, TensorRT-RTX 1.7.1;
a plugin creator registered from Python: abort), and because its peak memory is worth knowing per engine. What
TensorRT logs goes to stdout, one message a line, marked with its severity. No torch here.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.backends import _plugins, _trt_module
from exporter.errors import EnvironmentMismatch, ExportError, UsageError, nearest

TIMINGS = "timing.cache"
"""What the builder measured: read and written in the folder if it is there (empty at first)."""
TELL_EVERY_S = 0.25

Bounds = list[tuple[int, int, int]]
"""(min, opt, max) per axis."""


def build(request: Mapping[str, Any]) -> dict[str, Any]:
    """Parse, configure, build, write. Returns the facts for the engine's record."""
    trt = _trt_module.load(request["module"])
    started = time.perf_counter()
    messages: list[tuple[str, str]] = []
    logger = _logger(trt, messages)
    try:
        builder = trt.Builder(logger)
    except Exception as e:  # without CUDA, full TensorRT returns no builder, which pybind makes a TypeError
        raise EnvironmentMismatch(
            f"{request['module']} {trt.__version__} cannot make a builder on this machine: {_errors(messages) or e}. "
            'Full TensorRT builds on the GPU it builds for; option module = "tensorrt_rtx" builds without one.'
        ) from e
    if request["plugins"] is not None:
        _plugins.load(trt, request["plugins"]["library"])
    network = _network(trt, builder)
    _parse(trt, network, logger, request)
    config = builder.create_builder_config()
    _capabilities(trt, config, request)
    if request["workspace_mib"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_mib"] << 20)
    if request["strip_weights"]:
        for flag in (trt.BuilderFlag.STRIP_PLAN, trt.BuilderFlag.REFIT_IDENTICAL):
            config.set_flag(flag)
    # The inspector then names layers and where they come from; it costs no time when it is not asked.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt)
    timings = _timings(config)
    shapes = _profiles(builder, network, config, request["profiles"])
    facts = {
        "module": request["module"],
        "version": trt.__version__,
        "profiles": shapes,
        "layers": network.num_layers,
        "inputs": _tensors(network.num_inputs, network.get_input),
        "outputs": _tensors(network.num_outputs, network.get_output),
    }
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(
            f"{Path(request['graph']).name}: {request['module']} {trt.__version__} parsed the graph but could not "
            f"build the engine. It said: {_errors(messages) or 'nothing'}"
        )
    if timings is not None:
        Path(TIMINGS).write_bytes(timings.serialize())
    with open("engine", "wb") as f:
        f.write(engine)
        f.flush()
        os.fsync(f.fileno())
    return facts | {
        "weights_bytes": max(_totals(messages, "Weights"), default=None),
        "activation_bytes": _totals(messages, "Activation"),
        "warnings": sorted({text for severity, text in messages if severity == "WARNING"}),
        "build_s": round(time.perf_counter() - started, 3),
        "peak_rss_mib": round(peak_rss_mib(), 1),
    }


def _logger(trt: Any, messages: list[tuple[str, str]]) -> Any:
    """A logger that keeps and prints."""

    def tell(severity: str, line: str) -> None:
        messages.append((severity, line))
        sys.stdout.write(f"[{_trt_module.MARKS[severity]}] {line}\n")
        sys.stdout.flush()

    return _trt_module.logger(trt, tell)


def _timings(config: Any) -> Any:
    """The timing cache, where one is wanted. TensorRT itself ignores one of another version or GPU."""
    path = Path(TIMINGS)
    if not path.is_file():
        return None
    cache = config.create_timing_cache(path.read_bytes())
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _monitor(trt: Any) -> Any:
    """Prints how far the build is: the phases that are under way, outermost first."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[int, int]] = {}
            self.told = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.phases[phase] = (0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            self.phases[phase] = (step + 1, self.phases[phase][1])
            if (now := time.monotonic()) - self.told > TELL_EVERY_S:
                self.told = now
                under_way = " · ".join(f"{name} {done}/{steps}" for name, (done, steps) in self.phases.items())
                sys.stdout.write(f"[P] {under_way}\n")
                sys.stdout.flush()
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            self.phases.pop(phase, None)

    return Monitor()


def _errors(messages: Sequence[tuple[str, str]]) -> str:
    return " | ".join(text for severity, text in messages if severity in ("ERROR", "INTERNAL_ERROR"))


def _totals(messages: Sequence[tuple[str, str]], what: str) -> list[int]:
    """What the builder says it needs, one number per optimization profile (weights: one in all)."""
    pattern = re.compile(rf"Total {what} Memory: (\d+) bytes")
    return [int(m[1]) for _, text in messages if (m := pattern.search(text))]


def _network(trt: Any, builder: Any) -> Any:
    """A strongly typed network: asked for on 10.x; the only kind on 11.x and RTX, where the flag is harmless."""
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def _parse(trt: Any, network: Any, logger: Any, request: Mapping[str, Any]) -> None:
    """Read the graph by path: only so is external data (weights beyond 2 GB) found, relative to it.

    The parser lists every op it has no importer for, but of those its importers refuse only the first.
    """
    graph = Path(request["graph"])
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        if network.num_inputs and network.num_outputs:
            return
        raise ExportError(
            f"{graph.name}: not an ONNX graph (it has {network.num_inputs} inputs, {network.num_outputs} outputs)."
        )
    raise ExportError(_refusal(graph, f"{request['module']} {trt.__version__}", _parse_errors(parser)))


def _parse_errors(parser: Any) -> list[tuple[str, str]]:
    """(node, what is wrong) of every error the parser lists; node is empty where none is to blame."""
    errors = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        named = error.node() >= 0 or bool(error.node_name())
        node = f"{error.node_operator() or 'node'} '{error.node_name() or error.node()}'" if named else ""
        # "Assertion failed: <C++ condition>: <words>": the condition says nothing to the user.
        words = re.sub(r"^Assertion failed: .*?: ", "", " ".join(error.desc().split()))
        errors.append((node, f"{words} [{error.code().name}]"))
    return list(dict.fromkeys(errors))


def _refusal(graph: Path, told: str, errors: Sequence[tuple[str, str]]) -> str:
    nodes = [f"{node}: {words}" if node else words for node, words in errors]
    what = "1 problem" if len(nodes) == 1 else f"{len(nodes)} problems"
    return "\n".join(
        [
            f"{graph.name}: the ONNX parser of {told} refuses the graph, {what}:",
            *(f"  - {line}" for line in nodes),
            "Export again if the file is damaged; else choose a reduction without this op, or a CPU profile.",
        ]
    )


def _capabilities(trt: Any, config: Any, request: Mapping[str, Any]) -> None:
    wanted = request["compute_capabilities"]
    if wanted is None:
        return
    if not hasattr(trt, "ComputeCapability") or not hasattr(config, "set_compute_capability"):
        raise UsageError(
            f"{request['module']} {trt.__version__} builds for the GPU it runs on: leave out `compute_capabilities` "
            f'({wanted} given), or set module = "tensorrt_rtx".'
        )
    known = {int(k[2:]): v for k, v in trt.ComputeCapability.__members__.items() if k.startswith("SM")}
    if unknown := [sm for sm in wanted if sm not in known]:
        raise UsageError(
            f"{request['module']} {trt.__version__} has no compute capability {', '.join(map(str, unknown))}; it has "
            f"{', '.join(map(str, sorted(known)))}. For Jetson Orin (87) and "
            'Hopper (90) build there, with module = "tensorrt".'
        )
    config.num_compute_capabilities = len(wanted)
    for i, sm in enumerate(wanted):
        config.set_compute_capability(known[sm], i)


def _tensors(count: int, get: Any) -> dict[str, dict[str, Any]]:
    return {t.name: {"dtype": t.dtype.name, "shape": list(t.shape)} for t in map(get, range(count))}


def _profiles(builder: Any, network: Any, config: Any, profiles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add the optimization profiles. Returns profile → input → [min, opt, max] shapes."""
    shapes = {t.name: tuple(t.shape) for t in map(network.get_input, range(network.num_inputs))}
    dynamic = [name for name, shape in shapes.items() if -1 in shape]
    if dynamic and not profiles:
        raise UsageError(
            f"Inputs {', '.join(dynamic)} have dynamic dimensions: give a shape profile with their ranges."
        )
    given: dict[str, Any] = {}
    for profile in profiles:
        asked = profile["inputs"]
        for name in asked:
            if name not in shapes:
                raise UsageError(
                    f"Shape profile '{profile['name']}': the graph has no input '{name}'. {nearest(name, shapes)}"
                )
        if lacking := [name for name in dynamic if name not in asked]:
            raise UsageError(
                f"Shape profile '{profile['name']}' has no ranges for {', '.join(lacking)}, which are dynamic."
            )
        optimization = builder.create_optimization_profile()
        ranges = {}
        for name, axes in asked.items():
            bounds = _bounds(profile["name"], name, shapes[name], axes)
            ranges[name] = [list(shape) for shape in zip(*bounds, strict=True)]
            optimization.set_shape(name, *ranges[name])
        if dynamic and config.add_optimization_profile(optimization) < 0:
            raise ExportError(f"TensorRT does not accept shape profile '{profile['name']}': {ranges}")
        given[profile["name"]] = ranges
    return given


def _bounds(profile: str, name: str, shape: Sequence[int], axes: Sequence[Any]) -> Bounds:
    where = f"Shape profile '{profile}', input '{name}'"
    if len(axes) != len(shape):
        raise UsageError(f"{where}: {len(axes)} axes given, the graph has {len(shape)} ({list(shape)}; -1 is dynamic).")
    bounds: Bounds = []
    for i, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        low, typical, high = axis if isinstance(axis, list) else (axis, axis, axis)
        if not 0 <= low <= typical <= high:
            raise UsageError(f"{where}, axis {i}: min {low} ≤ opt {typical} ≤ max {high} does not hold.")
        if size != -1 and (low, high) != (size, size):
            raise UsageError(f"{where}, axis {i}: the graph has the fixed size {size}, the profile {low} to {high}.")
        bounds.append((low, typical, high))
    return bounds


def peak_rss_mib() -> float:
    """Most memory this process held. getrusage is second choice: its peak survives exec, so it may be the parent's."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def end_with(parent: int) -> None:
    """Die when whoever asked for the engine does, however it ends: nobody else would stop a build of minutes. Linux only."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the signal was asked for
            os.kill(os.getpid(), signal.SIGKILL)


def _failure(error: ExportError) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": str(error)}


def _save(result: Path, value: Mapping[str, Any]) -> None:
    beside = result.with_suffix(".tmp")
    beside.write_text(json.dumps(value))
    beside.replace(result)


def main() -> int:
    folder, parent = sys.argv[1:]
    end_with(int(parent))
    os.chdir(folder)
    result = Path("result.json")
    try:
        _save(result, build(json.loads(Path("request.json").read_text())))
    except ExportError as e:
        _save(result, _failure(e))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
