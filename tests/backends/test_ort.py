from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.backends._onnx_file import OnnxFile
from exporter.backends.ort import BACKEND, OnnxRuntime
from exporter.errors import EnvironmentMismatch, ExportError, UsageError, VerificationError

ROWS, COLUMNS = 256, 64
FLOAT, INT4, INT64 = TensorProto.FLOAT, TensorProto.INT4, TensorProto.INT64


def save(path: Path, nodes: Any, inputs: Any, outputs: Any, weights: dict[str, Any], **kwargs: Any) -> Path:
    """`inputs` and `outputs`: name → (type, shape). `weights`: arrays or tensors."""
    tensors = [
        w if isinstance(w, onnx.TensorProto) else numpy_helper.from_array(w, name) for name, w in weights.items()
    ]
    takes, gives = ([helper.make_tensor_value_info(n, *v) for n, v in given.items()] for given in (inputs, outputs))
    graph = helper.make_graph(nodes, path.stem, takes, gives, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path, **kwargs)
    return path


def cache(path: Path, dtype: Any = np.float32) -> Path:
    """Appends new to past, and multiplies it."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("Concat", ["past", "new"], ["present"], axis=1),
        helper.make_node("MatMul", ["new", "weight"], ["logits"]),
    ]
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(dtype)
    inputs = {"new": (kind, ["batch", "seq", 4]), "past": (kind, ["batch", "past", 4])}
    outputs = {"logits": (kind, ["batch", "seq", 3]), "present": (kind, ["batch", "total", 4])}
    return save(path, nodes, inputs, outputs, {"weight": weight})


def int4(path: Path, **kwargs: Any) -> Path:
    """One MatMul with INT4 weights in blocks of 128."""
    random = np.random.default_rng(0)
    quantized = random.integers(-8, 8, (ROWS, COLUMNS))
    scales = random.uniform(0.01, 0.02, (ROWS // 128, COLUMNS)).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=128),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    nibbles = quantized.ravel() & 15
    packed = (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8).tobytes()
    weights = {"q": helper.make_tensor("q", INT4, quantized.shape, packed, raw=True), "s": scales}
    return save(path, nodes, {"x": (FLOAT, ["batch", ROWS])}, {"y": (FLOAT, ["batch", COLUMNS])}, weights, **kwargs)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_cache_grows_from_device_value_to_device_value(tmp_path: Path, dtype: Any, bound: bool) -> None:
    """Both ways to run: what CUDA takes (`bound`) works on the CPU too."""
    graph, random = cache(tmp_path / "g.onnx", dtype), np.random.default_rng(1)
    plain = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    with BACKEND.runner(graph, threads=1) as runner:
        runner._bound = bound
        assert dict(runner.inputs) == {"new": dtype, "past": dtype}
        assert runner.outputs == ("logits", "present")
        past: Any = np.empty((2, 0, 4), dtype)
        whole = np.empty((2, 0, 4), dtype)
        first: Any = None
        for step in range(4):
            new = random.standard_normal((2, 3, 4)).astype(dtype)
            found = runner.run({"past": past, "new": new})  # in any order
            whole = np.concatenate([whole, new], axis=1)
            wanted = plain.run(None, {"new": new, "past": whole[:, : 3 * step]})
            assert np.array_equal(runner.numpy(found["logits"]), wanted[0])
            assert np.array_equal(runner.numpy(found["present"]), whole)
            past = found["present"]
            assert isinstance(past, onnxruntime.OrtValue), "it came to the host"
            first = first or (past, whole)
    assert np.array_equal(runner.numpy(first[0]), first[1]), "a later run wrote into an earlier result"


def test_a_strided_array_is_what_it_shows(tmp_path: Path) -> None:
    new = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with BACKEND.runner(cache(tmp_path / "g.onnx")) as runner:
        found = runner.run({"new": new[:, ::-1], "past": np.empty((2, 0, 4), np.float32)})
        assert np.array_equal(runner.numpy(found["present"]), new[:, ::-1])
        assert runner.numpy(new) is new


def test_a_run_lets_go_of_what_it_was_fed(tmp_path: Path) -> None:
    with BACKEND.runner(cache(tmp_path / "g.onnx")) as runner:
        runner._bound = True
        new = np.zeros((2, 3, 4), np.float32)
        runner.run({"new": new, "past": np.empty((2, 0, 4), np.float32)})
        assert not runner._binding.get_outputs()


@pytest.mark.parametrize("bound", [False, True])
def test_wrong_feeds_are_told(tmp_path: Path, bound: bool) -> None:
    new, past = np.zeros((1, 2, 4), np.float32), np.zeros((1, 0, 4), np.float32)
    with BACKEND.runner(cache(tmp_path / "g.onnx")) as runner:
        runner._bound = bound
        with pytest.raises(UsageError, match=r"g\.onnx has no input 'pats'\. Did you mean 'past'"):
            runner.run({"new": new, "pats": past})
        with pytest.raises(UsageError, match=r"inputs not fed: past\. Fed: new"):
            runner.run({"new": new})
        with pytest.raises(UsageError, match="input 'past' is float64, expected float32"):
            runner.run({"new": new, "past": past.astype(np.float64)})
        with pytest.raises(ExportError, match=r"g\.onnx: .*past \[2, 1, 4\]"):
            runner.run({"new": new, "past": np.zeros((2, 1, 4), np.float32)})
        halves = onnxruntime.OrtValue.ortvalue_from_numpy(past.astype(np.float16))
        with pytest.raises(ExportError, match=r"(?s)(data type.*past \[1, 0, 4\]|is float16, expected float32)"):
            runner.run({"new": new, "past": halves})
        assert runner.run({"new": new, "past": past}).keys() == {"logits", "present"}, "still works"
    with pytest.raises(AssertionError, match="context manager"):
        runner.run({"new": new, "past": past})


def test_int4_is_exact_at_level_0(tmp_path: Path) -> None:
    graph, x = int4(tmp_path / "g.onnx"), np.random.default_rng(2).standard_normal((3, ROWS)).astype(np.float32)
    model = onnx.load(graph)
    quantized, scales = (numpy_helper.to_array(t) for t in model.graph.initializer)
    wanted = x @ (quantized.astype(np.float32) * scales.repeat(128, axis=0))

    def error(backend: OnnxRuntime) -> float:
        with backend.runner(graph, threads=1) as runner:
            found = runner.numpy(runner.run({"x": x})["y"])
        return float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))

    assert error(OnnxRuntime(accuracy_level=0)) < 1e-6
    assert 1e-4 < error(OnnxRuntime()) < 2e-2


def test_build_records_what_the_graph_became(tmp_path: Path) -> None:
    graph = int4(tmp_path / "g.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    lines: list[str] = []
    record = BACKEND.build(graph, ("prefill", "decode"), [], tmp_path / "engines", {"threads": 1}, lines.append)
    weights = tmp_path / "w.data"
    assert record.roles == ("prefill", "decode")
    assert (tmp_path / "engines" / record.file).resolve() == graph
    assert record.sha256 == hashlib.sha256(graph.read_bytes()).hexdigest()
    assert record.bytes == graph.stat().st_size + weights.stat().st_size
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record.details["external"] == {"w.data": {"sha256": digest, "bytes": weights.stat().st_size}}
    assert record.details["kernels"] == {"MatMulNBits": 1}
    assert record.backend == "ort"
    assert record.peak_rss_mib > 10
    assert "1 MatMulNBits" in lines[0]
    assert not list((tmp_path / "engines").iterdir()), "the engine is the graph; nothing else stays"
    with BACKEND.runner(tmp_path / "engines" / record.file) as runner:
        assert runner.run({"x": np.zeros((1, ROWS), np.float32)}).keys() == {"y"}


def test_an_unfused_int4_matmul_shows(tmp_path: Path) -> None:
    """The layout that ONNX Runtime does not fuse, at many times the latency: that is what the count is for."""
    graph = int4(tmp_path / "g.onnx")
    model = onnx.load(graph)
    _, matmul = model.graph.node
    q, s = (numpy_helper.to_array(t) for t in model.graph.initializer)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["t"], axis=1, block_size=128),
        helper.make_node("Transpose", ["t"], ["w"], perm=[1, 0]),
        matmul,
    ]
    weights = {"q": numpy_helper.from_array(q.T.copy(), "q"), "s": s.T.copy()}
    save(graph, nodes, {"x": (FLOAT, ["batch", ROWS])}, {"y": (FLOAT, ["batch", COLUMNS])}, weights)
    kernels = BACKEND.build(graph, ("decode",), [], tmp_path, {}, print).details["kernels"]
    assert kernels["DequantizeLinear"] == 1
    assert "MatMulNBits" not in kernels


def test_operators_and_files_are_those_onnx_sees(tmp_path: Path) -> None:
    branch = {
        name: helper.make_graph(
            [helper.make_node(kind, ["x", f"w_{name}"], ["out"])], name, [],
            [helper.make_tensor_value_info("out", FLOAT, [2])],
            [numpy_helper.from_array(np.ones(2, np.float32), f"w_{name}")],
        ) for name, kind in (("then_branch", "Add"), ("else_branch", "Mul"))
    }  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["y"], **branch),
    ]
    graph = save(
        tmp_path / "g.onnx", nodes, {"x": (FLOAT, [2])}, {"y": (FLOAT, [2])}, {},
        save_as_external_data=True, size_threshold=0, location="sub.data",
    )  # fmt: skip
    found = OnnxFile(graph)
    assert Counter(found.operators) == {"Constant": 1, "If": 1, "Add": 1, "Mul": 1}
    external = Counter(
        entry.value
        for sub in (
            branch_attribute.g
            for branch_attribute in onnx.load(graph, load_external_data=False).graph.node[1].attribute
        )
        for tensor in sub.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    )
    assert set(external) <= set(found.locations) <= {"sub.data"}


def test_weights_from_elsewhere_are_refused(tmp_path: Path) -> None:
    graph = int4(tmp_path / "g.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    model = onnx.load(graph, load_external_data=False)
    for where, error, message in (
        ("../w.data", VerificationError, "outside its folder"),
        ("/etc/passwd", VerificationError, "outside its folder"),
        ("v.data", ExportError, "which is not there"),
    ):
        for tensor in model.graph.initializer:
            next(e for e in tensor.external_data if e.key == "location").value = where
        graph.write_bytes(model.SerializeToString())
        with pytest.raises(error, match=message):
            BACKEND.build(graph, ("decode",), [], tmp_path, {}, print)


@pytest.mark.parametrize("content", [b"", b"nothing like a graph", b"\x3a\xff\xff\xff\xff\x0f"])
def test_a_damaged_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"g\.onnx is (empty|not an ONNX file)"):
        BACKEND.build(tmp_path / "g.onnx", ("decode",), [], tmp_path, {}, print)
    with pytest.raises(ExportError, match="does not load"), BACKEND.runner(tmp_path / "g.onnx"):
        pass


def test_what_cannot_be_asked_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = cache(tmp_path / "g.onnx")
    for options, message in (
        ({"provder": "cpu"}, "no option 'provder'. Did you mean 'provider'"),
        ({"provider": "tpu"}, "no provider 'tpu'"),
        ({"threads": 0}, "threads is 0"),
        ({"accuracy_level": 5}, "accuracy_level is 5"),
    ):
        with pytest.raises(UsageError, match=message):
            BACKEND.build(graph, ("decode",), [], tmp_path, options, print)
    with pytest.raises(ExportError, match="no graph"):
        BACKEND.build(tmp_path / "x.onnx", ("decode",), [], tmp_path, {}, print)
    assert BACKEND.missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install onnxruntime" in str(BACKEND.missing())
    with pytest.raises(EnvironmentMismatch, match="pip install"):
        BACKEND.runner(graph)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_cuda_never_falls_back_silently(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    graph = cache(tmp_path / "g.onnx")
    runner = OnnxRuntime(provider="cuda").runner(graph)
    with pytest.raises(EnvironmentMismatch, match="needs an NVIDIA GPU"):
        runner.__enter__()
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
def test_cuda(tmp_path: Path) -> None:
    with OnnxRuntime(provider="cuda").runner(cache(tmp_path / "g.onnx")) as runner:
        found = runner.run({"new": np.ones((1, 2, 4), np.float32), "past": np.empty((1, 0, 4), np.float32)})
        assert found["present"].device_name() == "cuda"
        assert np.array_equal(runner.numpy(found["present"]), np.ones((1, 2, 4)))
