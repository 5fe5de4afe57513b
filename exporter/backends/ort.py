"""ONNX Runtime: runs the exported graphs as they are, on the CPU or on CUDA. The engine is the ONNX file itself.

Options of `build` (and of `OnnxRuntime(...)`, for runners):

============== ====================================================================================================
provider       "cpu" (default) or "cuda"; asked for and not there is an error, never a silent fallback
threads        threads of one operator; without it, ONNX Runtime's choice
accuracy_level of INT4 and INT8 MatMuls: 0 computes in the graph's float type (exact, for parity tests), 4 in INT8.
               Without it ONNX Runtime takes 4: relative error 5e-3 to 7e-3, and faster
============== ====================================================================================================

FP16 graphs run at about the speed of FP32 on a CPU, INT4 ones several times faster in decode; BF16 does not run at all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.backends import _ort_profile
from exporter.backends._contract import (
    PAST,
    PRESENT,
    Array,
    Backend,
    EngineRecord,
    Layer,
    Log,
    Runner,
    ShapeProfile,
    Steps,
)
from exporter.backends._gather import Gather
from exporter.backends._onnx_file import OnnxFile, external_files
from exporter.backends._ort_angles import Angles
from exporter.backends._ort_append import Appending
from exporter.backends._ort_cache import Grown
from exporter.backends._ort_steps import AppendingSteps
from exporter.bundle import sha256
from exporter.errors import EnvironmentMismatch, ExportError, UsageError, nearest
from exporter.flavours._contract import LAST
from exporter.graphset import PAD

OPTIONS = ("provider", "threads", "accuracy_level")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LEVELS = (0, 1, 2, 3, 4)
CHUNK = 512

_DTYPES: dict[str, type[np.generic]] = {
    "float": np.float32, "float16": np.float16, "double": np.float64, "bool": np.bool_,
    "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
    "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
}  # fmt: skip
_NUMBERS = {
    np.dtype(kind): number for number, kind in enumerate("f4 u1 i1 u2 i2 i4 i8 S ? f2 f8 u4 u8".split(), start=1)
}
"""What `onnx.TensorProto` calls a dtype; 8 is text."""
_FATAL, _ERROR = 4, 3  # ONNX Runtime's log severities


class OnnxRuntime(Backend):
    """`build` proves that a graph loads and records what it became; nothing is converted or copied."""

    name = "ort"
    runs_graphs = True

    def __init__(self, provider: str = "cpu", threads: int | None = None, accuracy_level: int | None = None) -> None:
        if provider not in PROVIDERS:
            raise UsageError(f"Backend ort has no provider '{provider}'. {nearest(provider, PROVIDERS)}")
        if threads is not None and not (_whole(threads) and threads > 0):
            raise UsageError(f"Option threads is {threads!r}; expected a whole number above 0.")
        if accuracy_level is not None and not (_whole(accuracy_level) and accuracy_level in LEVELS):
            raise UsageError(f"Option accuracy_level is {accuracy_level!r}; expected 0 (exact) to 4 (INT8).")
        self.provider, self.threads, self.accuracy_level = provider, threads, accuracy_level

    def missing(self) -> str | None:
        if importlib.util.find_spec("onnxruntime") is None:
            return (
                "Python module `onnxruntime` is not installed: `pip install onnxruntime` (for CUDA: onnxruntime-gpu)."
            )
        return None

    def missing_to_run(self) -> str | None:
        return self.missing()

    def build(
        self, graph: Path, roles: tuple[str, ...], profiles: Sequence[ShapeProfile], out: Path,
        options: Mapping[str, Any], log: Log,
    ) -> EngineRecord:  # fmt: skip
        """Open the graph once. `details` holds the kernels it became: an INT4 MatMul must show as MatMulNBits.

        The record's `sha256` is the ONNX file's; files with its weights are in `details["external"]`, and `bytes`
        counts all of them. Shape profiles mean nothing here: every shape is dynamic. `peak_rss_mib` is this process's.
        """
        for key in options:
            if key not in OPTIONS:
                raise UsageError(f"Backend ort has no option '{key}'. {nearest(key, OPTIONS)}")
        chosen = OnnxRuntime(**options)
        chosen._require()
        external = external_files(graph)
        out.mkdir(parents=True, exist_ok=True)
        _reset_peak_rss()
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix=f".{graph.stem}-", suffix=".tmp", dir=out) as scratch:
            saved = Path(scratch) / "optimized.onnx"
            _open(graph, chosen, saved)
            build_s = time.perf_counter() - begin
            kernels = Counter(OnnxFile(saved).operators) if saved.is_file() else Counter()
        peak = _peak_rss_mib()
        weights = {name: {"sha256": sha256(path), "bytes": path.stat().st_size} for name, path in external.items()}
        details = {
            "provider": chosen.provider,
            "onnxruntime": _ort().__version__,
            "kernels": dict(sorted(kernels.items())),
            "external": weights,
        }
        log(f"{graph.name}: loaded in {build_s:.1f} s, {_summary(kernels)}")
        size = graph.stat().st_size + sum(path.stat().st_size for path in external.values())
        file = Path(os.path.relpath(graph, out)).as_posix()
        return EngineRecord(roles, file, sha256(graph), size, build_s, peak, self.name, details)

    def runner(
        self, engine: Path, threads: int | None = None, repeats: bool = False, graph: Path | None = None,
        profiled: bool = False,
    ) -> OnnxRuntimeRunner:  # fmt: skip
        self._require()
        backend = OnnxRuntime(self.provider, threads or self.threads, self.accuracy_level)
        return OnnxRuntimeRunner(engine, backend, repeats, profiled)

    def _require(self) -> None:
        if missing := self.missing():
            raise EnvironmentMismatch(missing)


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX file.

    Its device values are `OrtValue`s, and fed back they are not copied. On the CPU they go in and come out directly: with 16
    layers of width 1024 a decode step costs 0.8 of one that passes numpy arrays, because the memory of an `OrtValue`
    returns to ONNX Runtime's arena. On CUDA they are bound, so that results stay on the device.

    A graph that appends to its cache in place (`exporter.flavours.ort`) is run by `Appending`: its cache is a `Grown`, and nothing
    is copied, allocated or bound from step to step.
    """

    def __init__(self, engine: Path, backend: OnnxRuntime, repeats: bool = False, profiled: bool = False) -> None:
        self._engine, self._backend, self._repeats = engine, backend, repeats
        # On a GPU the profile has how long it takes to launch a kernel, not how long that runs.
        self._profiles = profiled and backend.provider == "cpu"
        self._profile: tempfile.TemporaryDirectory[str] | None = None
        self._bound = backend.provider != "cpu"
        self._session: Any = None
        self._appending: Appending | None = None
        self._inputs: dict[str, np.dtype[Any]] = {}
        self._outputs: tuple[str, ...] = ()

    def __enter__(self) -> OnnxRuntimeRunner:
        if self._profiles:
            self._profile = tempfile.TemporaryDirectory(prefix="edgetrim-profile-")
        try:
            session = _open(self._engine, self._backend, repeats=self._repeats, profile=self._profile)
        except BaseException:
            if self._profile is not None:
                self._profile.cleanup()
            raise
        self._inputs = {i.name: _dtype(i.name, i.type) for i in session.get_inputs()}
        self._outputs = tuple(o.name for o in session.get_outputs())
        self._binding = session.io_binding()
        self._value_type: type[Any] = _ort().OrtValue
        if LAST in self._inputs:
            self._require_cpu()
            angles = Angles(session.get_modelmeta().custom_metadata_map, _open_small)
            self._appending = Appending(session, self._inputs, angles, self._shared, self.numpy)
            self._inputs, self._outputs = self._appending.inputs, self._appending.outputs
        self._gather = Gather(PROVIDERS[self._backend.provider], self._backend.provider, self._backend.threads)
        self._session = session
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._session.end_profiling()  # else it is written when the session goes, into a folder that has gone
            self._profile.cleanup()
            self._profile = None
        self._session = self._binding = self._appending = None
        self._gather.close()

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        self._loaded()
        return self._inputs

    @property
    def outputs(self) -> Sequence[str]:
        self._loaded()
        return self._outputs

    @property
    def in_words(self) -> str:
        return f"ONNX Runtime, {self._backend.provider.upper()}"

    def layers(self, rounds: int = 1) -> Sequence[Layer]:
        """The nodes that ran; ends the profile. None without one: a session does not tell what became of its graph."""
        self._loaded()
        return () if self._profile is None else _ort_profile.layers(Path(self._session.end_profiling()), rounds)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self._loaded()
        if feeds.keys() != self._inputs.keys():
            raise UsageError(self._wrong_names(feeds))
        if self._appending is not None:
            new = {name: feeds[name] for name in self._appending.new}
            past = {name: value for name, value in feeds.items() if name not in new}
            found, grown = self.grow(new, past, feeds["order"].shape[1])
            return found | {PRESENT + name[len(PAST) :]: value for name, value in grown.items()}
        try:
            values = self._run_bound(feeds) if self._bound else self._run_values(feeds)
        except Exception as e:
            raise self._failed(e, feeds) from e
        return dict(zip(self._outputs, values, strict=True))

    def grow(
        self, feeds: Mapping[str, Any], past: Mapping[str, Any], tokens: int
    ) -> tuple[dict[str, Any], Mapping[str, Any]]:
        self._loaded()
        if self._appending is None:
            return super().grow(feeds, past, tokens)
        if feeds.keys() != self._appending.new.keys() or (
            not isinstance(past, Grown) and feeds.keys() | past.keys() != self._inputs.keys()
        ):
            raise UsageError(self._wrong_names({**feeds, **past}))
        try:
            return self._appending.grow(feeds, past)
        except Exception as e:
            raise self._failed(e, feeds) from e

    def steps(self, feeds: Mapping[str, Array], words: Array, past: Mapping[str, Any]) -> Steps:
        self._loaded()
        if self._appending is None or feeds["order"].max() == PAD:
            return super().steps(feeds, words, past)
        return AppendingSteps(self, self._appending, self._failed, feeds, words, past)

    def numpy(self, value: Any) -> Array:
        if isinstance(value, self._value_type):
            host: Array = value.numpy()
            return host
        return np.asarray(value)

    def chunk(self, cached: bool) -> int | None:
        """On a CPU attention pays for every score, masked or not: with 2,080 tokens, five chunks take 0.65 of the time of one."""
        return None if self._bound or self._appending is not None else CHUNK

    def gather(self, value: Any, rows: npt.NDArray[np.int64]) -> Any:
        return self._gather(value, rows) if isinstance(value, self._value_type) else value[rows]

    def rows(self, past: Mapping[str, Any], rows: npt.NDArray[np.int64]) -> Mapping[str, Any]:
        return past.rows(rows) if isinstance(past, Grown) else super().rows(past, rows)

    def _run_values(self, feeds: Mapping[str, Any]) -> Sequence[Any]:
        values = {name: self._value(name, value) for name, value in feeds.items()}
        found: Sequence[Any] = self._session.run_with_ort_values(self._outputs, values)
        return found

    def _run_bound(self, feeds: Mapping[str, Any]) -> Sequence[Any]:
        binding, device = self._binding, self._backend.provider
        try:
            for name, value in feeds.items():
                if isinstance(value, self._value_type):
                    binding.bind_ortvalue_input(name, value)
                else:
                    binding.bind_cpu_input(name, self._host(name, value))
            # Bound anew each time: a binding keeps the last run's buffers and would write the next result into them.
            for name in self._outputs:
                binding.bind_output(name, device)
            self._session.run_with_iobinding(binding)
            found: Sequence[Any] = binding.get_outputs()
            return found
        finally:
            # Nothing may keep a KV cache alive that the caller has let go.
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()

    def _value(self, name: str, value: Any) -> Any:
        """An OrtValue on the host."""
        if isinstance(value, self._value_type):
            return value
        return self._shared(self._host(name, value))

    def _shared(self, array: Array) -> Any:
        """An OrtValue of the same memory. `ortvalue_from_numpy`, which looks for the device by its name, takes 2.5 times as long."""
        return self._value_type.ortvalue_from_numpy_with_onnx_type(array, _NUMBERS[array.dtype])

    def _host(self, name: str, value: Any) -> Array:
        array = value if isinstance(value, np.ndarray) else self.numpy(value)
        if array.dtype != self._inputs[name]:
            raise UsageError(f"{self._engine.name}: input '{name}' is {array.dtype}, expected {self._inputs[name]}.")
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)

    def _failed(self, error: Exception, feeds: Mapping[str, Any]) -> ExportError:
        if isinstance(error, ExportError):
            return error
        return ExportError(f"{self._engine.name}: {error} (fed: {_shapes(feeds)})")

    def _wrong_names(self, feeds: Mapping[str, Any]) -> str:
        for name in feeds:
            if name not in self._inputs:
                return f"{self._engine.name} has no input '{name}'. {nearest(name, self._inputs)}"
        absent = ", ".join(name for name in self._inputs if name not in feeds)
        return f"{self._engine.name}: inputs not fed: {absent}. Fed: {', '.join(feeds) or 'none'}."

    def _require_cpu(self) -> None:
        if self._bound:
            raise UsageError(
                f"{self._engine.name} appends to its cache in place, which is for the CPU. With provider "
                f"'{self._backend.provider}', run the plain graph: leave `flavour` out of [stack] and export again."
            )

    def _loaded(self) -> None:
        assert self._session is not None, "a runner is a context manager: use it inside `with`"


def _ort() -> Any:
    import onnxruntime

    return onnxruntime


def _open(
    graph: Path, backend: OnnxRuntime, save_optimized: Path | None = None, repeats: bool = False,
    profile: tempfile.TemporaryDirectory[str] | None = None,
) -> Any:  # fmt: skip
    """An inference session. The optimized graph is saved on request, with its weights in a file beside it; a profile is written into
    the folder given.

    A model is several sessions, each with threads of its own. Those of one that has just run would go on spinning where the
    next one runs; those of one that repeats are wanted again at once.
    """
    ort = _ort()
    if not graph.is_file():
        raise ExportError(f"There is no graph {graph}. Run export first.")
    options = ort.SessionOptions()
    if not repeats:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = _ERROR
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(profile.name, "profile"))
    if backend.threads:
        options.intra_op_num_threads = backend.threads
    if backend.accuracy_level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(backend.accuracy_level))
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    provider = PROVIDERS[backend.provider]
    if provider not in ort.get_available_providers():
        raise _no_provider(backend.provider)
    if provider != PROVIDERS["cpu"]:
        ort.set_default_logger_severity(_FATAL)  # a library that is not there is told below, in one sentence
    try:
        session = ort.InferenceSession(str(graph), options, providers=[provider])
    except Exception as e:
        raise ExportError(f"ONNX Runtime {ort.__version__} does not load {graph}: {e}") from e
    finally:
        if provider != PROVIDERS["cpu"]:
            ort.set_default_logger_severity(_ERROR)
    if provider not in session.get_providers():
        raise _no_provider(backend.provider)
    return session


def _open_small(model: bytes) -> Any:
    """A session of a model that is hardly anything, on the CPU."""
    options = _ort().SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, _ERROR
    return _ort().InferenceSession(model, options, providers=[PROVIDERS["cpu"]])


def _no_provider(provider: str) -> EnvironmentMismatch:
    return EnvironmentMismatch(
        f"ONNX Runtime cannot use {provider} here: it needs an NVIDIA GPU, the package onnxruntime-gpu and "
        "the CUDA and cuDNN libraries that go with it. Use provider 'cpu', or install them."
    )


def _dtype(name: str, kind: str) -> np.dtype[Any]:
    dtype = _DTYPES.get(kind.removeprefix("tensor(").removesuffix(")"))
    if dtype is None:
        raise ExportError(f"Input '{name}' is {kind}, which has no numpy type. Known: {', '.join(_DTYPES)}.")
    return np.dtype(dtype)


def _shapes(feeds: Mapping[str, Any]) -> str:
    def shape(value: Any) -> Any:
        return value.shape() if callable(value.shape) else value.shape

    return ", ".join(f"{name} {list(shape(value))}" for name, value in feeds.items() if hasattr(value, "shape"))


def _summary(kernels: Counter[str]) -> str:
    told = [f"{kernels[name]} {name}" for name in ("MatMulNBits", "MatMul", "DequantizeLinear") if kernels[name]]
    return f"{kernels.total()} kernels" + (f" ({', '.join(told)})" if told else "")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _reset_peak_rss() -> None:
    """Let Linux count this process's peak anew; elsewhere the peak is that of the process's whole life."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_rss_mib() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 0.0


BACKEND = OnnxRuntime()
