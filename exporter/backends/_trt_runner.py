"""Runs a TensorRT engine: picks the optimization profile, keeps values on the device, replays CUDA graphs.

Written against TensorRT's documented Python interface, 10.3 and newer and TensorRT-RTX alike.
"""

from __future__ import annotations

import logging
import mmap
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.backends import _engine_cache, _plugins, _trt_layers, _trt_module
from exporter.backends._contract import PAST, PRESENT, Array, Layer, Runner
from exporter.backends._cuda import CudaError
from exporter.backends._device_memory import Device, DeviceArray
from exporter.backends._engine_cache import EngineCache
from exporter.backends._slots import Place, Slots
from exporter.errors import EnvironmentMismatch, ExportError, UsageError, nearest

LOG = logging.getLogger(__name__)

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

RECORDED = 16
"""Runs remembered per engine, with their CUDA graphs: the latest used ones."""

_DTYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32, "HALF": np.float16, "BOOL": np.bool_,
    "INT8": np.int8, "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8,
}  # fmt: skip
_RTX_MAGIC = b"vtrt"


@dataclass(frozen=True)
class Bounds:
    """One optimization profile: smallest and largest shape per input."""

    low: Shapes
    high: Shapes

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        return not any(map(self.misfit, shapes, shapes.values()))

    def misfit(self, name: str, shape: Shape) -> bool:
        low, high = self.low[name], self.high[name]
        return len(shape) != len(low) or any(
            not least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
        )

    def size(self) -> int:
        """Elements of all inputs at their largest."""
        return sum(int(np.prod(shape)) for shape in self.high.values())


class TensorRtRunner(Runner):
    """Runs one engine on the GPU.

    Device values are `DeviceArray`s; all TensorRT runners of a process share one GPU, stream and pool of memory. Prefill and
    decode of one engine are one runner: the smallest optimization profile that takes the shapes is used, so it is switched once
    for an answer.

    What comes a second time with the same shapes at the same addresses is recorded as a CUDA graph, and replayed from then on: runs
    of the vision side, and steps of decode, whose cache has free slots behind it (`_slots`). TensorRT-RTX records by itself.
    """

    def __init__(self, engine: Path, graph: Path | None = None) -> None:
        self._path, self._graph = engine, graph
        self._open = ExitStack()
        self._context: Any = None
        self._kernels: Any = None
        self._errors: list[str] = []
        self._shapes: Shapes = {}
        self._found: Shapes = {}
        self._longest: Shapes = {}
        self._places: dict[str, Place] = {}
        self._step = 0
        self._profile = 0
        self._recorded: OrderedDict[Any, int | None] = OrderedDict()
        self._recordable = True

    def __enter__(self) -> TensorRtRunner:
        with ExitStack() as stack:
            self._device = Device.open()
            stack.callback(self._device.close)
            stack.callback(self._release)
            self._device.cuda.use()
            engine = self._engine = self._load()
            if engine.refittable:
                self._refit(engine)
            self._describe(engine)
            self._context = self._new_context(engine)
            if self._context is None:
                raise self._failed("gives no execution context; its scratch memory may not fit on the GPU")
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        self._loaded()
        return self._inputs

    @property
    def outputs(self) -> Sequence[str]:
        self._loaded()
        return tuple(self._outputs)

    @property
    def in_words(self) -> str:
        self._loaded()
        return f"{self._trt.__name__} {self._trt.__version__}, {self._device.cuda.gpu.name}"

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        with self._working():
            return self._start(feeds, {}, repeats=True)

    def grow(
        self, feeds: Mapping[str, Any], past: Mapping[str, Any], tokens: int
    ) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """The engine writes the whole new cache; what is new in it goes into free slots of the one that was fed (`_slots`). Caches get
        memory for as many tokens as the engine was built for, so that none is too small for the next step.

        Where another output would tell the free slots, a cache is shown as long as it is."""
        self._loaded()
        presents = {name: PRESENT + name[len(PAST) :] for name in past}
        with self._working():
            given = {name: self._given(name, past[name]) for name in self._places if name in past}
            given = {n: value.alone(self._device) if isinstance(value, Slots) else value for n, value in given.items()}
            shown = {name: value.shown if isinstance(value, Slots) else value for name, value in given.items()}
            steps = tokens == 1 and any(isinstance(value, Slots) for value in given.values())
            found = self._start({**feeds, **past, **shown}, presents, repeats=steps)
            grown = {PAST + name[len(PRESENT) :]: found.pop(name) for name in list(found) if name.startswith(PRESENT)}
            for name, value in given.items():
                present = grown.pop(name)  # when it is let go, the next one may have its memory
                grown[name] = Slots.of(self._device, self._places[name], value, present, tokens)
        return found, grown

    def numpy(self, value: Any) -> Array:
        if not isinstance(value, DeviceArray | Slots):
            return np.asarray(value)
        self._loaded()
        return value.numpy(self._device) if isinstance(value, Slots) else self._device.to_host(value)

    @property
    def batch(self) -> int | None:
        self._loaded()
        return self._longest[next(iter(self._inputs))][0]

    def chunk(self, cached: bool) -> int | None:
        """Behind a cache, the most that a profile with a cache takes. A prompt is run whole, in the profile without one."""
        self._loaded()
        if not cached:
            return None
        return self._step or None

    def gather(self, value: Any, rows: npt.NDArray[np.int64]) -> Any:
        if isinstance(value, Slots):
            return value.rows(self._device, rows)
        return self._device.rows(value, rows) if isinstance(value, DeviceArray) else value[rows]

    def layers(self, rounds: int = 1) -> Sequence[Layer]:
        """As TensorRT's inspector tells them, without times."""
        self._loaded()
        inspector = self._engine.create_engine_inspector()
        return _trt_layers.layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    @contextmanager
    def _working(self) -> Iterator[None]:
        """What is asked of the GPU inside is done at the end."""
        self._loaded()
        try:
            self._device.cuda.use()
            yield
            self._device.synchronize()
        except CudaError as e:
            raise ExportError(f"{self._path.name}: {e}{self._said()}") from e

    def _start(self, feeds: Mapping[str, Any], grown: Mapping[str, str], repeats: bool) -> dict[str, Any]:
        """Ask for a run. grown: input → the output that continues it. repeats: whether these shapes come again."""
        if feeds.keys() != self._inputs.keys():
            raise UsageError(self._wrong_names(feeds))
        given = {name: self._dense(self._given(name, feeds[name])) for name in self._inputs}
        self._shape({name: value.shape for name, value in given.items()})
        room = {present: self._room(self._found[present], past) for past, present in grown.items()}
        take = self._device.pool.array
        found = {n: take(shape, self._outputs[n], room.get(n)) for n, shape in self._found.items()}
        self._enqueue({**given, **found}, repeats)
        return found

    def _room(self, present: Shape, past: str) -> Shape:
        """The shape of a cache that is as long as the engine takes it; what is longer still cannot go on."""
        axes = zip(self._shapes[past], present, self._longest[past], strict=True)
        return tuple(now if now == before else max(now, longest) for before, now, longest in axes)

    def _dense(self, value: DeviceArray | Slots) -> DeviceArray:
        return value.dense(self._device) if isinstance(value, Slots) else value

    def _given(self, name: str, value: Any) -> DeviceArray | Slots:
        wanted = self._inputs[name]
        if value.dtype != wanted:
            raise UsageError(f"{self._path.name}: input '{name}' is {value.dtype}, expected {wanted}.")
        return value if isinstance(value, DeviceArray | Slots) else self._device.to_device(value)

    def _shape(self, shapes: Shapes) -> None:
        """Tell the context the shapes, if they are other ones than last time; find those of the outputs."""
        if shapes == self._shapes:
            return
        self._shapes = {}
        self._choose(shapes)
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._failed(f"does not take {list(shape)} for '{name}'")
        if unknown := self._context.infer_shapes():
            raise self._failed(f"leaves shapes open: {', '.join(unknown)}")
        self._found = {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
        self._shapes = shapes

    def _choose(self, shapes: Shapes) -> None:
        """Take the smallest optimization profile that takes the shapes: the turns of a conversation could decode too."""
        fitting = [i for i, bounds in enumerate(self._bounds) if bounds.takes(shapes)]
        if not fitting:
            raise UsageError(self._too_large(shapes))
        profile = min(fitting, key=lambda i: self._bounds[i].size())
        if profile == self._profile:
            return
        if not self._context.set_optimization_profile_async(profile, self._device.cuda.stream):
            raise self._failed(f"does not switch to optimization profile {profile}")
        self._profile = profile

    def _enqueue(self, values: Mapping[str, DeviceArray], repeats: bool) -> None:
        cuda = self._device.cuda
        key = (tuple(self._shapes.items()), tuple(value.address for value in values.values())) if repeats else None
        if key is not None and (graph := self._recorded.get(key)) is not None:
            self._recorded.move_to_end(key)
            cuda.launch(graph)
            return
        for name, value in values.items():
            if not self._context.set_tensor_address(name, value.address):
                raise self._failed(f"does not take memory for '{name}'")
        if not self._context.execute_async_v3(cuda.stream):
            raise self._failed("could not be run")
        if key is not None:
            self._remember(key, self._record() if key in self._recorded else None)

    def _remember(self, key: Any, graph: int | None) -> None:
        """The graph of such a run, or that there was one."""
        self._recorded[key] = graph
        if len(self._recorded) > RECORDED and (old := self._recorded.popitem(last=False)[1]) is not None:
            self._device.cuda.drop(old)

    def _record(self) -> int | None:
        """Record the run that was just made: what has to happen once for its shapes has happened. None for an engine that
        cannot be recorded (one with loops, say): it is run as before, and that is said once."""
        cuda = self._device.cuda
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX has it
        if not self._recordable or (capturable is not None and not capturable(cuda.stream)):
            return None
        try:
            cuda.begin_recording()
            enqueued = self._context.execute_async_v3(cuda.stream)
            graph = cuda.end_recording()
        except CudaError as e:
            self._unrecorded(f": {e}")
            return None
        if not enqueued:
            cuda.drop(graph)
            self._unrecorded(self._said())
            return None
        return graph

    def _unrecorded(self, why: str) -> None:
        """It is not tried again."""
        self._recordable = False
        LOG.warning(
            "%s cannot be recorded as a CUDA graph%s Its kernels are launched one by one, which is slower.",
            self._path.name,
            why,
        )

    def _load(self) -> Any:
        """The engine. Code of the host's that lies in a plan is not run (`engine_host_code_allowed`)."""
        if not self._path.is_file():
            raise ExportError(f"There is no engine {self._path}. Run build first.")
        with self._path.open("rb") as file:
            module = "tensorrt_rtx" if file.read(len(_RTX_MAGIC)) == _RTX_MAGIC else "tensorrt"
            self._trt = _trt_module.load(module)
            self._logger = _trt_module.logger(self._trt, self._note)
            if plugins := _plugins.needed(self._path):
                _plugins.load(self._trt, plugins["library"])
            self._runtime = self._trt.Runtime(self._logger)
            self._runtime.engine_host_code_allowed = False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            gpu = self._device.cuda.gpu
            raise EnvironmentMismatch(
                f"{self._path.name} does not open with {module} {self._trt.__version__} on {gpu.name} (SM {gpu.compute_capability / 10:.1f})"
                f"{self._said()} An engine runs with the version and on the GPU it was built for: run `edgetrim build` here."
            )
        return engine

    def _refit(self, engine: Any) -> None:
        """Give an engine that was built without weights those of its graph."""
        if self._graph is None or not self._graph.is_file():
            raise ExportError(
                f"{self._path.name} was built without weights, and its graph is not there. Build it again."
            )
        refitter = self._trt.Refitter(engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_file(str(self._graph)) or not refitter.refit_cuda_engine():
            raise self._failed(f"does not take the weights of {self._graph.name}")

    def _new_context(self, engine: Any) -> Any:
        """TensorRT-RTX compiles kernels when they are first run; it is given what it compiled before on this GPU."""
        if not hasattr(self._trt, "IRuntimeCache"):
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        self._kernels = config.create_runtime_cache()
        cache = EngineCache.default()
        if cache is not None and (known := cache.recall(self._kernels_name())):
            self._kernels.deserialize(known)
        config.set_runtime_cache(self._kernels)
        strategies = getattr(self._trt, "CudaGraphStrategy", None)
        if strategies is not None:
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if self._recordable else strategies.DISABLED
            self._recordable = False
        return engine.create_execution_context(config)

    def _keep_kernels(self) -> None:
        cache = EngineCache.default()
        if self._kernels is None or cache is None:
            return
        data = self._kernels.serialize()
        if data is not None and (data := bytes(data)) != cache.recall(self._kernels_name()):
            cache.learn(self._kernels_name(), data)

    def _kernels_name(self) -> str:
        return f"{_engine_cache.key({'version': self._trt.__version__, 'gpu': astuple(self._device.cuda.gpu)})}.kernels"

    def _release(self) -> None:
        self._keep_kernels()
        for graph in self._recorded.values():
            if graph is not None:
                self._device.cuda.drop(graph)
        self._recorded.clear()
        self._context = self._kernels = self._engine = self._runtime = self._logger = None

    def _describe(self, engine: Any) -> None:
        trt, self._inputs, self._outputs = self._trt, dict[str, np.dtype[Any]](), dict[str, np.dtype[Any]]()
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            dtype = _DTYPES.get(engine.get_tensor_dtype(name).name)
            if dtype is None or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise ExportError(
                    f"{self._path.name}: '{name}' is {engine.get_tensor_dtype(name).name} in {engine.get_tensor_location(name).name} "
                    f"memory; expected one of {', '.join(_DTYPES)} on the device. Export and build it again."
                )
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self._inputs if is_input else self._outputs)[name] = np.dtype(dtype)
        self._bounds = [
            Bounds(*({n: tuple(engine.get_tensor_profile_shape(n, i)[end]) for n in self._inputs} for end in (0, 2)))
            for i in range(engine.num_optimization_profiles)
        ]
        self._longest = {n: tuple(map(max, zip(*(b.high[n] for b in self._bounds), strict=True))) for n in self._inputs}
        pasts = [name for name in self._inputs if name.startswith("past_")]
        spans = [
            bounds.high["inputs_embeds"][1]
            for bounds in self._bounds
            if "inputs_embeds" in bounds.high and all(0 not in bounds.high[name] for name in pasts)
        ]
        self._step = max(spans, default=0)  # most tokens behind a cache
        self._recordable = bool(pasts) or "inputs_embeds" not in self._inputs  # prompts differ in length
        ends = {"logits", *("present" + name[4:] for name in pasts)}
        if pasts and ends == self._outputs.keys():
            axes = {name: self._axis(name) for name in pasts}
            self._places = {n: Place.of(n, a, self._longest[n][a]) for n, a in axes.items() if a is not None}
        self._profile, self._shapes = 0, {}

    def _axis(self, name: str) -> int | None:
        """That of tokens: the one behind the batch that was built for several sizes."""
        low = map(min, zip(*(bounds.low[name] for bounds in self._bounds), strict=True))
        sizes = enumerate(zip(low, self._longest[name], strict=True))
        return next((axis for axis, (least, most) in sizes if axis and least != most), None)

    def _note(self, severity: str, text: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._errors.append(text)

    def _said(self) -> str:
        """What TensorRT has complained of since the last time."""
        said, self._errors = " | ".join(self._errors), []
        return f": {said.rstrip('.')}." if said else "."

    def _failed(self, what: str) -> ExportError:
        return ExportError(f"{self._path.name} {what}{self._said()}")

    def _too_large(self, shapes: Shapes) -> str:
        """Which input no optimization profile takes, measured by the one that takes most of them."""
        bounds = min(self._bounds, key=lambda b: sum(map(b.misfit, shapes, shapes.values())))
        name = next(name for name, shape in shapes.items() if bounds.misfit(name, shape))
        return (
            f"{self._path.name} was not built for {name} {list(shapes[name])}: it takes {list(bounds.low[name])} to "
            f"{list(bounds.high[name])}. Raise `[limits]` in the profile and build again, or ask for less."
        )

    def _wrong_names(self, feeds: Mapping[str, Any]) -> str:
        for name in feeds:
            if name not in self._inputs:
                return f"{self._path.name} has no input '{name}'. {nearest(name, self._inputs)}"
        absent = ", ".join(name for name in self._inputs if name not in feeds)
        return f"{self._path.name}: inputs not fed: {absent}. Fed: {', '.join(feeds) or 'none'}."

    def _loaded(self) -> None:
        assert self._context is not None, "a runner is a context manager: use it inside `with`"
