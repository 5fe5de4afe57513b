"""The bookkeeping of the TensorRT runner, on a fake GPU: memory, optimization profiles, CUDA graphs, errors."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from exporter.backends import _cuda, trt
from exporter.backends._contract import EngineRecord
from exporter.backends._cuda import Cuda, CudaError, Gpu, first_gpu
from exporter.backends._device_memory import Device, Pool, size_class
from exporter.backends._trt_layers import layers
from exporter.backends._trt_runner import TensorRtRunner
from exporter.bundle import contents, sha256
from exporter.engines import open_runners, runnable_engines
from exporter.errors import EnvironmentMismatch, ExportError, UsageError, VerificationError
from exporter.graphset import GraphSet
from exporter.runtime.generate import Generator
from exporter.stages.build import record_json, shape_profile, shape_profiles, turn
from exporter.workspace import Workspace
from profiles import _schema
from tests.backends import fake_trt
from tests.backends.test_ort import cache
from tests.conftest import Said, needs_rtx
from tests.contract.test_runners import GROWS, LIMITS, LONG, PIXELS, generator, on_fake
from tests.runtime import tiny

EMPTY = np.empty((2, 0, 4), np.float32)


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[ctypes.CDLL]:
    with fake_trt.installed(tmp_path) as found:
        yield found
        found.fake_limit(0)


def numbers(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((2, 3, 4)).astype(np.float32)


@needs_rtx
@pytest.mark.parametrize(
    ("stands_for", "real"),
    [
        (fake_trt.Engine, "ICudaEngine"), (fake_trt.Context, "IExecutionContext"), (fake_trt.Runtime, "Runtime"),
        (fake_trt.IRuntimeConfig, "IRuntimeConfig"), (fake_trt.IRuntimeCache, "IRuntimeCache"),
        (fake_trt.EngineInspector, "EngineInspector"), (fake_trt.Refitter, "Refitter"), (fake_trt.OnnxParserRefitter, "OnnxParserRefitter"),
        (fake_trt.TensorIOMode, "TensorIOMode"), (fake_trt.TensorLocation, "TensorLocation"),
        (fake_trt.DataType, "DataType"), (fake_trt.LayerInformationFormat, "LayerInformationFormat"),
    ],
)  # fmt: skip
def test_the_fake_has_nothing_that_tensorrt_lacks(stands_for: type, real: str) -> None:
    """Names of methods and enumeration members, against TensorRT-RTX's own classes."""
    import tensorrt_rtx

    own = {name for name in vars(stands_for) if not name.startswith("_")} - {"opened"}
    assert own
    assert own <= set(dir(getattr(tensorrt_rtx, real)))


def test_the_driver_says_what_it_is(driver: ctypes.CDLL) -> None:
    cuda = Cuda()
    assert cuda.gpu == first_gpu() == Gpu("Fake GPU", 87, 12060, 1 << 30)
    assert cuda.memory() == (1 << 30, 1 << 30)
    cuda.close()
    assert _cuda.missing() is None
    assert trt.BACKEND.missing_to_run() is None


def test_decode_allocates_nothing_and_stays_in_its_profile(driver: ctypes.CDLL, tmp_path: Path) -> None:
    graphs = tiny.export(tmp_path)
    blocks: list[int] = []
    with ExitStack() as stack:
        model = generator(stack, tmp_path, graphs, on_fake)
        decode = next(e for e in fake_trt.Engine.opened if "past_key_0" in e.io)
        model.generate(PIXELS[:1], [LONG], 20, on_token=lambda row, token: blocks.append(driver.fake_blocks()))
        assert len(blocks) > 10
        assert len(set(blocks[len(blocks) // 2 :])) == 1, "decode still allocates"
        assert decode.context.switched == 1, "prefill is profile 0; decode is reached once"
        before = driver.fake_blocks()
        model.generate(PIXELS[:1], [LONG], 20)
        assert driver.fake_blocks() == before, "the second answer needs no memory of its own"
        assert decode.context.switched == 3
    assert driver.fake_blocks() == 0, "memory is left behind"


def test_a_cache_takes_two_sets_of_buffers(
    driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bytes as an estimate counts, and not more in a second answer or another turn."""
    taken: list[int] = []
    allocate = Cuda.allocate
    monkeypatch.setattr(Cuda, "allocate", lambda self, size: taken.append(size) or allocate(self, size))
    graphs = tiny.export(tmp_path)
    longest = {
        name: axes[2].max for name, axes in shape_profile("decode", graphs, LIMITS).inputs.items() if "key" in name
    }
    (past,) = {*longest.values()}
    each = graphs.text.kv_heads * past * graphs.text.head_dim * np.dtype(np.float32).itemsize
    with ExitStack() as stack:
        model = generator(stack, tmp_path, graphs, on_fake)
        for _ in range(2):
            model.reply(model.generate(PIXELS[:1], [LONG], 12).cache, [[20, 21]], 4)
        held = [size for size in taken if size == size_class(each)]
        assert sum(held) <= trt.BACKEND.holds([each] * 2 * graphs.text.layers)


def test_a_run_that_repeats_is_replayed(driver: ctypes.CDLL, tmp_path: Path) -> None:
    with on_fake(cache(tmp_path / "g.onnx"), [GROWS]) as runner:
        context = fake_trt.Engine.opened[-1].context
        for seed in range(5):
            new = numbers(seed)
            found = runner.run({"new": new, "past": EMPTY})
            assert np.array_equal(runner.numpy(found["present"]), new)
            del found
        # The first run takes memory as it comes; from the second on, if not before, the addresses are the same.
        assert context.executed in (2, 3)
        assert (len(context.recorded), driver.fake_launches()) == (1, 5 - context.executed)
        assert context.shaped == 2, "the shapes did not change"
        held = runner.run({"new": new, "past": EMPTY})
        other = runner.run({"new": numbers(9), "past": EMPTY})
        assert np.array_equal(runner.numpy(held["present"]), new), "a replay wrote into a value that is held"
        assert np.array_equal(runner.numpy(other["present"]), numbers(9))


def test_a_cache_is_not_recorded(driver: ctypes.CDLL, tmp_path: Path) -> None:
    with on_fake(cache(tmp_path / "g.onnx"), [GROWS]) as runner:
        for _ in range(4):
            runner.grow({"new": numbers(0)}, {"past": EMPTY}, 3)
        assert not fake_trt.Engine.opened[-1].context.recorded


def test_an_engine_that_cannot_be_recorded_is_run(driver: ctypes.CDLL, tmp_path: Path) -> None:
    with on_fake(cache(tmp_path / "g.onnx"), [GROWS]) as runner:
        context = fake_trt.Engine.opened[-1].context
        context.capturable = False
        for seed in range(4):
            assert np.array_equal(
                runner.numpy(runner.run({"new": numbers(seed), "past": EMPTY})["present"]), numbers(seed)
            )
        assert (context.executed, driver.fake_launches()) == (4, 0)


@pytest.mark.parametrize("at", ["begin_recording", "end_recording"])
def test_a_recording_that_fails_is_said_once(
    at: str, driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the runs go on without; what is said goes to stderr, where a program has set up no logging."""

    def fail(self: Cuda) -> int:
        raise CudaError(
            901, "The NVIDIA driver's cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (901)."
        )

    monkeypatch.setattr(Cuda, "begin_recording", lambda self: None)
    monkeypatch.setattr(Cuda, at, fail)
    with on_fake(cache(tmp_path / "g.onnx"), [GROWS]) as runner:
        for seed in range(5):
            found = runner.run({"new": numbers(seed), "past": EMPTY})
            assert np.array_equal(runner.numpy(found["present"]), numbers(seed))
            del found
    said = capsys.readouterr().err
    assert said.count("cannot be recorded as a CUDA graph: The NVIDIA driver's cuStreamEndCapture failed") == 1
    assert said.strip().endswith("(901). Its kernels are launched one by one, which is slower.")


def test_shapes_outside_every_profile_are_told(driver: ctypes.CDLL, tmp_path: Path) -> None:
    graphs = tiny.export(tmp_path)
    with ExitStack() as stack:
        model = generator(stack, tmp_path, graphs, on_fake)
        long = [1, tiny.IMAGE, *range(4, 4 + LIMITS.text)]
        with pytest.raises(
            UsageError,
            match=r"not built for inputs_embeds \[1, 37, 16\]: it takes \[1, 5, 16\] to \[4, 36, 16\]\. Raise `\[limits\]`",
        ):
            model.generate(PIXELS[:1], [long], 2)
        assert model.batch == LIMITS.batch
        assert model._decode.chunk(cached=True) == turn(graphs, LIMITS).max > 4
        assert model._decode.chunk(cached=False) is None
        assert model._vision.chunk(cached=True) is None


def test_what_fails_is_told_with_tensorrts_words(driver: ctypes.CDLL, tmp_path: Path) -> None:
    with on_fake(cache(tmp_path / "g.onnx"), [GROWS]) as runner:
        fake_trt.Engine.opened[-1].context.fails = True
        with pytest.raises(
            ExportError, match=r"g\.engine could not be run: an illegal memory access was encountered\."
        ):
            runner.run({"new": numbers(0), "past": EMPTY})
    (tmp_path / "other.engine").write_bytes(b"ftrt, and then something else")
    with pytest.raises(
        EnvironmentMismatch,
        match=r"other\.engine does not open with tensorrt 10\.3\.0 on Fake GPU \(SM 8\.7\): Magic tag",
    ):
        TensorRtRunner(tmp_path / "other.engine").__enter__()
    with pytest.raises(ExportError, match="There is no engine"):
        TensorRtRunner(tmp_path / "none.engine").__enter__()
    assert driver.fake_blocks() == 0
    assert Device._shared is None, "a runner that did not open holds the GPU"


def test_values_cannot_be_read_when_the_last_runner_is_closed(driver: ctypes.CDLL, tmp_path: Path) -> None:
    graph = cache(tmp_path / "g.onnx")
    with on_fake(graph, [GROWS]) as runner:
        with on_fake(graph, [GROWS]) as other:
            found = other.run({"new": numbers(0), "past": EMPTY})["present"]
        assert np.array_equal(runner.numpy(found), numbers(0)), "another one is open, so the memory is there"
    assert driver.fake_blocks() == 0
    with pytest.raises(AssertionError):
        runner.numpy(found)
    del found  # its memory is gone: nothing is given back


def test_out_of_memory_is_told_after_idle_memory_was_freed(driver: ctypes.CDLL) -> None:
    device = Device.open()
    driver.fake_limit(1 << 20)
    held = device.to_device(np.zeros(100_000, np.float32))
    for size in (10_000, 20_000, 30_000, 40_000):
        device.to_device(np.zeros(size, np.float32))
    assert driver.fake_blocks() == 5
    large = device.to_device(np.ones(140_000, np.float32))
    assert driver.fake_blocks() == 2, "what was idle had to go"
    with pytest.raises(EnvironmentMismatch, match=r"out of memory: 0\.2 MiB wanted, 0 of 1 MiB free(.|\n)*export INT4"):
        device.to_device(np.zeros(60_000, np.float32))
    assert device.to_host(large).min() == 1
    assert not device.to_host(held).any()
    device.close()
    assert driver.fake_blocks() == 0


def test_sizes_are_at_most_an_eighth_too_large() -> None:
    sizes = [size_class(n) for n in range(1, 100_000, 7)]
    assert all(n <= size <= max(256, n * 9 / 8) for n, size in zip(range(1, 100_000, 7), sizes, strict=True))
    assert len(set(sizes)) < 90


def test_a_buffer_comes_back_when_it_is_let_go() -> None:
    given: list[int] = []
    pool = Pool(lambda size: given.append(size) or 4096 * len(given), lambda address: None, lambda: (0, 0))
    first, second = pool.take(1000), pool.take(1000)
    assert first.address != second.address
    address = second.address
    del second
    assert pool.take(1010).address == address
    assert len(given) == 2


def built(work: Workspace, graphs: GraphSet) -> None:
    """What build leaves behind, with engines for the fake GPU."""
    work.engines.mkdir()
    records = []
    for file, roles in graphs.roles().items():
        path = work.engines / f"{Path(file).stem}.engine"
        fake_trt.engine(path, work.graphs / file, shape_profiles(roles, graphs, LIMITS))
        size = path.stat().st_size
        records.append(EngineRecord(roles, path.name, sha256(path), size, 1.0, 1.0, "trt", {"module": "tensorrt"}))
    (work.engines / "engines.json").write_text(json.dumps(record_json(records)))


@pytest.fixture
def output(tmp_path: Path) -> Workspace:
    """An output folder as run leaves it before pack."""
    work = Workspace(tmp_path / "out")
    work.graphs.mkdir(parents=True)
    built(work, tiny.export(work.graphs))
    return work


def test_engines_that_were_built_are_what_runs(driver: ctypes.CDLL, output: Workspace) -> None:
    profile = _schema.load("orin_nano_8gb_int4")
    with open_runners(output.folder, profile) as (runners, graphs, table, what):
        assert what == "tensorrt 10.3.0, Fake GPU"
        assert runners["prefill"] is runners["decode"], "one engine, with its weights once"
        found = Generator(runners, graphs, table).generate(PIXELS[:1], [LONG], 8).tokens
    with open_runners(output.folder, _schema.load("cpu_fp32")) as (runners, graphs, table, what):
        assert what == "ONNX Runtime, CPU"
        assert Generator(runners, graphs, table).generate(PIXELS[:1], [LONG], 8).tokens == found


def test_engines_that_were_not_built_are_not_run(driver: ctypes.CDLL, output: Workspace) -> None:
    (output.engines / "engines.json").unlink()
    with open_runners(output.folder, _schema.load("orin_nano_8gb_int4")) as (_, _, _, what):
        assert what == "ONNX Runtime, CPU, on the graphs of orin_nano_8gb_int4"


@pytest.mark.parametrize("packed", [False, True])
def test_an_engine_that_was_changed_is_not_opened(driver: ctypes.CDLL, output: Workspace, packed: bool) -> None:
    """An engine is code. Whoever can write the record next to it still has to change the manifest."""
    if packed:
        manifest = {"schema": 1, "files": contents(output.folder)}
        (output.folder / "manifest.json").write_text(json.dumps(manifest))
    graphs, profile = GraphSet.load(output.graphs), _schema.load("orin_nano_8gb_int4")
    assert runnable_engines(output.folder, graphs, profile).keys() == graphs.roles().keys()
    engine = output.engines / "vision.engine"
    engine.write_bytes(engine.read_bytes() + b" ")
    if packed:
        records = json.loads((output.engines / "engines.json").read_text())
        next(r for r in records if r["file"] == "vision.engine")["sha256"] = sha256(engine)
        (output.engines / "engines.json").write_text(json.dumps(records))
    with pytest.raises(VerificationError, match=r"vision\.engine is not the engine that was built or packed"):
        runnable_engines(output.folder, graphs, profile)
    assert not fake_trt.Engine.opened
    engine.unlink()
    with pytest.raises(VerificationError, match=r"no engine vision\.engine"):
        runnable_engines(output.folder, graphs, profile)


def test_an_engine_from_elsewhere_is_refused(driver: ctypes.CDLL, output: Workspace) -> None:
    records = json.loads((output.engines / "engines.json").read_text())
    (output.folder / "vision.engine").write_bytes((output.engines / "vision.engine").read_bytes())
    records[0]["file"] = "../vision.engine"
    (output.engines / "engines.json").write_text(json.dumps(records))
    with pytest.raises(VerificationError, match=r"no engine \.\./vision\.engine"):
        runnable_engines(output.folder, GraphSet.load(output.graphs), _schema.load("orin_nano_8gb_int4"))


def test_an_engine_without_weights_takes_those_of_its_graph(driver: ctypes.CDLL, output: Workspace) -> None:
    vision = output.engines / "vision.engine"
    vision.write_text(json.dumps({**json.loads(vision.read_text()), "stripped": True}))
    with pytest.raises(ExportError, match=r"vision\.engine was built without weights, and its graph is not there"):
        trt.BACKEND.runner(vision).__enter__()
    with trt.BACKEND.runner(vision, graph=output.graphs / "vision.onnx") as runner:
        assert runner.run({"pixel_values": PIXELS}).keys() == {"hidden", "score"}


def test_kernels_that_were_compiled_are_kept_for_the_next_process(
    driver: ctypes.CDLL, output: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorRT-RTX has it; full TensorRT compiles when it builds."""
    monkeypatch.setattr(sys.modules["tensorrt"], "IRuntimeCache", fake_trt.IRuntimeCache, raising=False)
    monkeypatch.setenv("EDGETRIM_CACHE", str(tmp_path / "cache"))
    for said in (b"compiled", b"compiled, again"):
        with trt.BACKEND.runner(output.engines / "vision.engine"):
            assert fake_trt.Engine.opened[-1].config.cache.kernels == said
        (kept,) = (tmp_path / "cache").glob("*.kernels")
        assert kept.read_bytes() == said


def test_an_engine_is_inspected(driver: ctypes.CDLL, output: Workspace, edgetrim: Callable[..., Said]) -> None:
    shown = edgetrim("inspect", output.engines / "vision.engine", "--json")
    assert shown.code == 0, shown.err
    data = json.loads(shown.out)
    assert (data["roles"], data["opened"]) == (["vision"], "tensorrt 10.3.0, Fake GPU")
    assert [layer["name"] for layer in data["layers"]] == ["pixel_values", "hidden", "score"]
    (output.engines / "vision.engine").write_bytes(b"another")
    assert edgetrim("inspect", output.engines / "vision.engine").code == 6
    (output.engines / "other.engine").write_bytes(b"other")
    assert edgetrim("inspect", output.engines / "other.engine").code == 2


@pytest.mark.gpu
@pytest.mark.parametrize("strip", [False, True])
def test_a_real_engine(tmp_path: Path, strip: bool) -> None:
    """On a GPU: built, with and without weights, opened, run and replayed, inspected."""
    if missing := trt.BACKEND.missing_to_run():
        pytest.skip(missing)
    graph = cache(tmp_path / "g.onnx")
    record = trt.BACKEND.build(graph, ("decode",), [GROWS], tmp_path / "out", {"strip_weights": strip}, print)
    weight = numpy_helper.to_array(onnx.load(graph).graph.initializer[0])
    with trt.BACKEND.runner(tmp_path / "out" / record.file, graph=graph) as runner:
        for seed in range(4):
            found = runner.run({"new": numbers(seed), "past": EMPTY})
            assert np.array_equal(runner.numpy(found["present"]), numbers(seed))
            np.testing.assert_allclose(runner.numpy(found["logits"]), numbers(seed) @ weight, atol=1e-2)
            del found
        by_itself = hasattr(runner._trt, "CudaGraphStrategy")  # TensorRT-RTX records what it runs
        assert by_itself or any(graph is not None for graph in runner._recorded.values()), "nothing was recorded"
        assert runner.layers()


def test_layers_carry_the_scopes_of_their_nodes() -> None:
    """The form that TensorRT 10 documents for `EngineInspector` with ProfilingVerbosity.DETAILED."""
    dense = {
        "Name": "/model/visionzip/TopK + /model/visionzip/Cast", "LayerType": "TopK",
        "Inputs": [{"Name": "scores", "Location": "Device", "Dimensions": [1, 576], "Format/Datatype": "Row major linear FP32"}],
        "Outputs": [{"Name": "kept", "Location": "Device", "Dimensions": [1, 64], "Format/Datatype": "Row major Int64"}],
        "TacticName": "topk_warp",
        "Metadata": "[ONNX Layer: model/visionzip/TopK]\u001e[ONNX Layer: model/visionzip/Cast]\u001e[ONNX Layer: model/head/MatMul]",
    }  # fmt: skip
    found = layers(json.dumps({"Layers": [dense, "__myl_Fc_0"], "Bindings": []}))
    assert found[0].scopes == ("model/visionzip", "model/head")
    assert (found[0].output, found[0].tactic) == ("Row major Int64 [1, 64]", "topk_warp")
    assert found[1].name == "__myl_Fc_0"
    with pytest.raises(ExportError, match="form that is not known"):
        layers("[]")
