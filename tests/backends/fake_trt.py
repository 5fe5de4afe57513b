"""A GPU with TensorRT for tests on a machine without either: `fake_cuda.c` for the driver, and a module with the documented
interface of TensorRT's runtime whose engines are computed by ONNX Runtime. It is stricter than TensorRT where that would crash.

An engine's file is JSON: the graph, and [min, opt, max] of every input in every optimization profile.
"""

from __future__ import annotations

import ctypes
import enum
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest

from exporter.backends import _cuda
from exporter.backends._contract import ShapeProfile
from exporter.backends._device_memory import Device

HEADERS = Path("/usr/local/cuda/include")
NAMES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64", "tensor(bool)": "BOOL"}
TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "BOOL": np.bool_}
VERSION = "10.3.0"


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = 1, 2


class TensorLocation(enum.Enum):
    DEVICE, HOST = 0, 1


class LayerInformationFormat(enum.Enum):
    ONELINE, JSON = 0, 1


class DataType(enum.Enum):
    FLOAT, HALF, INT64, BOOL = range(4)


class Severity(enum.Enum):
    ERROR = 1


class ILogger:
    def __init__(self) -> None:
        self.ready = True


class Runtime:
    def __init__(self, logger: Any) -> None:
        assert logger.ready
        self.logger, self.engine_host_code_allowed = logger, True

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        assert self.engine_host_code_allowed is False
        try:
            return Engine(self.logger, **json.loads(bytes(plan)))
        except ValueError:
            self.logger.log(Severity.ERROR, "Magic tag does not match")
            return None


class Engine:
    opened: ClassVar[list[Engine]] = []

    def __init__(
        self, logger: Any, graph: str, profiles: list[dict[str, list[list[int]]]], stripped: bool = False
    ) -> None:
        self.logger, self.profiles, self.refittable = logger, profiles, stripped
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.io = {v.name: (v, TensorIOMode.INPUT) for v in self.session.get_inputs()}
        self.io |= {v.name: (v, TensorIOMode.OUTPUT) for v in self.session.get_outputs()}
        self.num_io_tensors, self.num_optimization_profiles = len(self.io), len(profiles)
        Engine.opened.append(self)

    def get_tensor_name(self, i: int) -> str:
        return list(self.io)[i]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[NAMES[self.io[name][0].type]]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.io[name][1]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, i: int) -> list[list[int]]:
        assert self.io[name][1] is TensorIOMode.INPUT
        return self.profiles[i][name]

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, config: IRuntimeConfig | None = None) -> Context:
        self.config = config
        assert not self.refittable, "an engine without weights"
        self.context = Context(self)
        return self.context


class EngineInspector:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def get_engine_information(self, form: LayerInformationFormat) -> str:
        assert form is LayerInformationFormat.JSON
        return json.dumps({"Layers": [{"Name": name} for name in self.engine.io], "Bindings": []})


class IRuntimeCache:
    def __init__(self) -> None:
        self.kernels = b"compiled"

    def serialize(self) -> bytes:
        return self.kernels

    def deserialize(self, blob: bytes) -> bool:
        self.kernels = blob + b", again"
        return True


class IRuntimeConfig:
    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


class Refitter:
    def __init__(self, engine: Engine, logger: Any) -> None:
        self.engine, self.graph = engine, ""

    def refit_cuda_engine(self) -> bool:
        self.engine.refittable = not Path(self.graph).is_file()
        return not self.engine.refittable


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self.refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        self.refitter.graph = path
        return path.endswith(".onnx")


class Context:
    """Counts what the runner does: `executed`, `switched`, `shaped`; fails a call that TensorRT would answer with a crash."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.driver = engine, ctypes.CDLL(_cuda.LIBRARY)
        self.driver.fake_size.restype, self.driver.fake_size.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        self.active_optimization_profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.executed = self.switched = self.shaped = 0
        self.recorded: list[Any] = []
        self.fails = self.capturable = False
        self.capturable = True

    def set_optimization_profile_async(self, i: int, stream: int) -> bool:
        assert stream, "the null stream"
        self.active_optimization_profile, self.shapes = i, {}
        self.switched += 1
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self.engine.profiles[self.active_optimization_profile][name]
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self.engine.logger.log(Severity.ERROR, f"{name}: {shape} is outside the optimization profile")
            return False
        self.shapes[name] = tuple(shape)
        self.shaped += 1
        return True

    def infer_shapes(self) -> list[str]:
        missing = [v.name for v in self.engine.session.get_inputs() if v.name not in self.shapes]
        if not missing:
            zeros = {
                n: np.zeros(shape, TYPES[self.engine.get_tensor_dtype(n).name]) for n, shape in self.shapes.items()
            }
            found = self.engine.session.run(None, zeros)
            names = [v.name for v in self.engine.session.get_outputs()]
            self.inferred = {n: value.shape for n, value in zip(names, found, strict=True)}
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get(name) or self.inferred[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        assert stream, "the null stream"
        if self.fails:
            self.engine.logger.log(Severity.ERROR, "an illegal memory access was encountered")
            return False
        work = self._work(dict(self.shapes), dict(self.addresses))
        if self.driver.fake_capturing():
            if self.capturable:
                self.recorded.append(ctypes.CFUNCTYPE(None)(work))  # a launch calls it: it has to live on
                self.driver.fake_record(self.recorded[-1])
            return True
        work()
        self.executed += 1
        return True

    def _work(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> Any:
        assert addresses.keys() == self.engine.io.keys(), "a tensor has no memory"
        outputs = self.inferred
        places = list(addresses.values())
        assert all(places.count(addresses[name]) == 1 for name in outputs), "an output shares its memory"

        def view(name: str, shape: tuple[int, ...]) -> Any:
            dtype = np.dtype(TYPES[self.engine.get_tensor_dtype(name).name])
            size = int(np.prod(shape)) * dtype.itemsize
            assert self.driver.fake_size(addresses[name]) >= max(1, size), f"{name}: the memory is too small, or freed"
            raw = (ctypes.c_char * size).from_address(addresses[name])
            return np.frombuffer(raw, dtype).reshape(shape)

        def work() -> None:
            feeds = {name: view(name, shape).copy() for name, shape in shapes.items()}
            for name, value in zip(outputs, self.engine.session.run(list(outputs), feeds), strict=True):
                view(name, outputs[name])[...] = value

        return work


def engine(path: Path, graph: Path, profiles: Sequence[ShapeProfile]) -> Path:
    """An engine's file of a graph, for the profiles that a build would be asked for."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    made = []
    for profile in profiles or [ShapeProfile("", {})]:
        ends: dict[str, list[list[int]]] = {}
        for value in session.get_inputs():
            axes = profile.inputs.get(value.name, value.shape)
            ends[value.name] = [
                [axis if isinstance(axis, int) else getattr(axis, end) for axis in axes]
                for end in ("min", "opt", "max")
            ]
        made.append(ends)
    path.write_text(json.dumps({"graph": str(graph), "profiles": made}))
    return path


@contextmanager
def installed(folder: Path) -> Iterator[ctypes.CDLL]:
    """A machine with the fake GPU and module; yields the driver. Skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the driver that stands in for a GPU")
    library = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", str(Path(__file__).with_name("fake_cuda.c"))]
    command += [f"-I{HEADERS}"] * HEADERS.is_dir() + ["-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    module = ModuleType("tensorrt")
    for thing in (ILogger, Runtime, Refitter, OnnxParserRefitter, TensorIOMode, TensorLocation, LayerInformationFormat):
        setattr(module, thing.__name__, thing)
    module.__version__ = VERSION
    module.__spec__ = __spec__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda, "LIBRARY", str(library))
        patch.setitem(sys.modules, "tensorrt", module)
        patch.setattr(Device, "_shared", None)
        Engine.opened.clear()
        yield ctypes.CDLL(str(library))
