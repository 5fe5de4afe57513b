"""Plugins against the subgraphs they replace, in engines of full TensorRT: `python -m benchmarks.plugins`.

For every plugin, one graph traced from its `eager`, built plain and with the plugin, FP16 and strongly typed; both engines run in
turn, each replayed from a CUDA graph, so that launches cost what they cost in use. Needs an NVIDIA GPU, `tensorrt`, torch with CUDA,
and the library (docs/plugins.md). Prints the median in microseconds and the quotient; 1.2 is what a profile asks for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plugins._apply import load, replace
from plugins._contract import Case
from plugins._library import HOW, VARIABLE, path

REPEATS = 20
"""Runs in one CUDA graph: a single one is too short for a clock."""

SIZES: Mapping[str, Sequence[tuple[str, Case]]] = {
    "token_select": [
        (f"{tokens} → {keep}, width {width}", Case([("score", (1, tokens)), ("x", (1, tokens + 64, width))], dict(tokens=tokens, keep=keep, tensors=1)))
        for tokens, keep, width in [(576, 64, 4096), (576, 192, 4096), (2304, 576, 2048), (4096, 1024, 3584)]
    ],
    "token_merge": [
        (f"{n} tokens, r = {r}, width {width}", Case([("metric", (1, n, 64)), ("x", (1, n, width)), ("size", (1, n))], dict(r=r, protected=1)))
        for n, r, width in [(197, 16, 768), (577, 23, 1024), (1025, 64, 1280)]
    ],
    "kv_compact": [
        (f"{tokens} → {keep}, {layers} layers, {heads} heads",
         Case([("index", (1, keep)), *[("x", (1, heads, tokens + 128, 128))] * (2 * layers)], dict(tokens=tokens, keep=keep, tensors=2 * layers)))
        for tokens, keep, layers, heads in [(576, 192, 14, 8), (576, 64, 28, 4), (2304, 576, 28, 8)]
    ],
}  # fmt: skip


def graphs(name: str, case: Case, folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """The plain graph, the one with the plugin, and inputs on the GPU."""
    import numpy as np
    import onnx_ir as ir
    import torch

    from exporter.stages._trace import trace

    plugin, draw = load(name), np.random.default_rng(0)

    class Subgraph(torch.nn.Module):
        def forward(self, values: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return tuple(plugin.eager(values, case.attributes))

    inputs = []
    for kind, shape in case.inputs:
        if kind == "index":
            inputs.append(torch.from_numpy(np.sort(draw.permutation(case.attributes["tokens"])[: shape[-1]])[None]))
        elif kind == "size":
            inputs.append(torch.ones(shape))
        else:
            x = torch.from_numpy(draw.normal(size=shape).astype(np.float32))
            inputs.append((x * 4096).round() if kind == "score" else x.half())
    names = [f"x{i}" for i in range(len(inputs))]
    model = trace(Subgraph(), {"values": inputs}, {"values": [{}] * len(inputs)}, names=names)
    ir.save(model, folder / "plain.onnx")
    if replace(model, name, plugin) != 1:
        raise SystemExit(f"{name}: its own subgraph was not found in the trace; run tests/contract/test_plugins.py")
    ir.save(model, folder / "plugin.onnx")
    return folder / "plain.onnx", folder / "plugin.onnx", dict(zip(names, (x.cuda() for x in inputs), strict=True))


class Engine:
    """One engine, `REPEATS` runs of it recorded as a CUDA graph."""

    def __init__(self, trt: Any, graph: Path, inputs: Mapping[str, Any]) -> None:
        import torch

        logger = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(graph)):
            raise SystemExit("\n".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
        plan = builder.build_serialized_network(network, builder.create_builder_config())
        if plan is None:
            raise SystemExit(f"TensorRT {trt.__version__} cannot build {graph.name}.")
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context = self._engine.create_execution_context()
        kinds = {"FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64}
        self._memory = dict(inputs)
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            if name not in self._memory:
                kind = kinds[self._engine.get_tensor_dtype(name).name]
                self._memory[name] = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=kind, device="cuda")
            self._context.set_tensor_address(name, self._memory[name].data_ptr())
        self._stream, self._graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            self._context.execute_async_v3(self._stream.cuda_stream)
        self._stream.synchronize()
        with torch.cuda.graph(self._graph, stream=self._stream):
            for _ in range(REPEATS):
                self._context.execute_async_v3(self._stream.cuda_stream)

    def time_us(self) -> float:
        """One run, in microseconds."""
        import torch

        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000 / REPEATS


def measure(trt: Any, name: str, case: Case, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        plain, plugged, inputs = graphs(name, case, Path(folder))
        engines = {"subgraph": Engine(trt, plain, inputs), "plugin": Engine(trt, plugged, inputs)}
        times: dict[str, list[float]] = {which: [] for which in engines}
        for _ in range(rounds):
            for which, engine in engines.items():
                times[which].append(engine.time_us())
    found = {f"{which}_us": round(statistics.median(each), 2) for which, each in times.items()}
    return found | {"times_faster": round(found["subgraph_us"] / found["plugin_us"], 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plugins", nargs="*", default=[*SIZES], help="default: all")
    parser.add_argument("--rounds", type=int, default=50)
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.plugins if name not in SIZES]:
        parser.error(f"no sizes for {', '.join(unknown)}; there are {', '.join(SIZES)}")
    library = path()
    if library is None:
        raise SystemExit(f"The library is not built. {HOW}; or set {VARIABLE}.")
    try:
        import tensorrt as trt
    except ImportError:
        raise SystemExit(
            "Python module `tensorrt` is not installed: pip install tensorrt (JetPack brings its own)."
        ) from None
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device: this compares engines on a GPU.")
    if trt.get_plugin_registry().load_library(str(library)) is None:
        raise SystemExit(f"TensorRT {trt.__version__} cannot load {library}. Build it again: {HOW}")
    print(json.dumps({"device": torch.cuda.get_device_name(), "tensorrt": trt.__version__, "repeats": REPEATS}))
    for name in given.plugins:
        for words, case in SIZES[name]:
            print(json.dumps({"plugin": name, "case": words, **measure(trt, name, case, given.rounds)}), flush=True)


if __name__ == "__main__":
    main()
