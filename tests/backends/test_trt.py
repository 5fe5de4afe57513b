"""Builds real engines with TensorRT-RTX, which needs no GPU for it; they are not run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import exporter
from exporter.backends import _cuda, trt
from exporter.backends._contract import EngineRecord, Range, ShapeProfile
from exporter.backends._trt_module import version
from exporter.backends._trt_runner import TensorRtRunner
from exporter.errors import EnvironmentMismatch, ExportError, UsageError
from tests.backends import fake_trt
from tests.conftest import needs_rtx

FP16, INT64 = TensorProto.FLOAT16, TensorProto.INT64
DIM, HEADS = 32, 2
RTX = {"module": "tensorrt_rtx", "compute_capabilities": [80, 120]}


def save(
    path: Path, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: dict[str, Any]
) -> Path:
    tensors = [w if isinstance(w, onnx.TensorProto) else numpy_helper.from_array(w, n) for n, w in weights.items()]
    graph = helper.make_graph(
        list(nodes), path.stem, [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs], tensors,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def random(*shape: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    return (np.random.default_rng(0).normal(size=shape) / 8).astype(np.float16)


def decoder(path: Path) -> Path:
    """One attention layer with a cache: past and new keys, concatenated; dynamic batch, seq and past."""
    head = DIM // HEADS
    nodes = [
        helper.make_node("MatMul", ["inputs_embeds", "w_qkv"], ["qkv"]),
        helper.make_node("Reshape", ["qkv", "split"], ["qkv_heads"]),
        helper.make_node("Transpose", ["qkv_heads"], ["by_part"], perm=[2, 0, 3, 1, 4]),
        *(helper.make_node("Gather", ["by_part", f"i{i}"], [part], axis=0) for i, part in enumerate("qkv")),
        helper.make_node("Concat", ["past_key_0", "k"], ["present_key_0"], axis=2),
        helper.make_node("Concat", ["past_value_0", "v"], ["present_value_0"], axis=2),
        helper.make_node("Transpose", ["present_key_0"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probs"], axis=-1),
        helper.make_node("MatMul", ["probs", "present_value_0"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["mixed_t"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["mixed_t", "join"], ["joined"]),
        helper.make_node("MatMul", ["joined", "w_out"], ["logits"]),
    ]
    cache = [1, HEADS, "past", head]
    return save(
        path, nodes,
        [("inputs_embeds", FP16, [1, "seq", DIM]), ("past_key_0", FP16, cache), ("past_value_0", FP16, cache)],
        [("logits", FP16, [1, "seq", DIM]), ("present_key_0", FP16, [1, HEADS, "all", head]),
         ("present_value_0", FP16, [1, HEADS, "all", head])],
        {"w_qkv": random(DIM, 3 * DIM), "w_out": random(DIM, DIM), "split": np.array([0, 0, 3, HEADS, head]),
         "join": np.array([0, 0, DIM])} | {f"i{i}": np.array(i) for i in range(3)},
    )  # fmt: skip


def ranges(name: str, seq: Range, past: Range | int) -> ShapeProfile:
    cache = (1, HEADS, past, DIM // HEADS)
    return ShapeProfile(name, {"inputs_embeds": (1, seq, DIM), "past_key_0": cache, "past_value_0": cache})


PROFILES = (ranges("prefill", Range(1, 16, 64), 0), ranges("decode", Range(1, 1, 4), Range(1, 32, 128)))


def build(
    graph: Path, profiles: Sequence[ShapeProfile] = (), log: list[str] | None = None, **options: Any
) -> EngineRecord:
    lines: list[str] = [] if log is None else log
    return trt.BACKEND.build(graph, ("decode",), profiles, graph.parent / "out", RTX | options, lines.append)


def left(graph: Path) -> list[str]:
    return sorted(p.name for p in (graph.parent / "out").rglob("*"))


@needs_rtx
def test_decoder_with_two_profiles(tmp_path: Path) -> None:
    log: list[str] = []
    record = build(decoder(tmp_path / "lm.onnx"), PROFILES, log)
    assert record.file == "lm.engine"
    assert left(tmp_path / "lm.onnx") == ["lm.engine"]
    assert record.bytes == (tmp_path / "out/lm.engine").stat().st_size > DIM * DIM * 4 * 2
    assert record.backend == "trt"
    assert record.roles == ("decode",)
    assert 0 < record.build_s < 120
    assert 50 < record.peak_rss_mib < 4000
    facts = record.details
    assert facts["module"] == "tensorrt_rtx"
    assert facts["compute_capabilities"] == [80, 120]
    assert facts["profiles"]["decode"]["past_key_0"] == [[1, 2, 1, 16], [1, 2, 32, 16], [1, 2, 128, 16]]
    assert facts["layers"] >= 13
    assert list(facts["inputs"]) == ["inputs_embeds", "past_key_0", "past_value_0"]
    assert facts["weights_bytes"] >= DIM * DIM * 4 * 2
    assert len(facts["activation_bytes"]) == 2
    assert any(line.startswith("[I] Total Activation Memory") for line in log)


@needs_rtx
def test_an_engine_is_for_the_gpus_that_were_asked_for(tmp_path: Path) -> None:
    """Kernels for fewer of them, and the same weights."""
    graph = decoder(tmp_path / "lm.onnx")
    some, one = build(graph, PROFILES), build(graph, PROFILES, compute_capabilities=[89])
    assert one.bytes < some.bytes
    assert one.details["weights_bytes"] == some.details["weights_bytes"]


@needs_rtx
def test_a_worker_whose_asker_is_gone_builds_nothing(tmp_path: Path) -> None:
    """The asker may die before the worker has come so far as to die with it."""
    (tmp_path / "request.json").write_text("{}")
    root = Path(exporter.__file__).parents[1]
    worker = subprocess.run([sys.executable, *trt.WORKER, str(tmp_path), str(os.getppid())], cwd=root, check=False)
    assert worker.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["request.json"]


@needs_rtx
def test_selection_builds(tmp_path: Path) -> None:
    """TopK, order restored by TopK on the indices, GatherND: the form every reduction selects with."""
    nodes = [
        helper.make_node("TopK", ["scores", "k"], ["_best", "best"], axis=-1),
        helper.make_node("TopK", ["best", "k"], ["index", "_place"], axis=-1, largest=0),
        helper.make_node("Unsqueeze", ["index", "last"], ["at"]),
        helper.make_node("GatherND", ["tokens", "at"], ["kept"], batch_dims=1),
    ]
    graph = save(
        tmp_path / "reduce.onnx", nodes,
        [("tokens", FP16, ["batch", 64, DIM]), ("scores", TensorProto.FLOAT, ["batch", 64])],
        [("kept", FP16, ["batch", 16, DIM]), ("index", INT64, ["batch", 16])],
        {"k": np.array([16]), "last": np.array([2])},
    )  # fmt: skip
    profile = ShapeProfile("images", {"tokens": (Range(1, 1, 4), 64, DIM), "scores": (Range(1, 1, 4), 64)})
    record = build(graph, [profile], workspace_mib=64)
    assert record.details["outputs"]["index"] == {"dtype": "INT64", "shape": [-1, 16]}


@needs_rtx
def test_int4_stays_packed(tmp_path: Path) -> None:
    """Blocked INT4 DequantizeLinear before MatMul: the engine holds 4-bit weights, about a quarter of FP16."""
    size, block = 1024, 128
    weight = np.random.default_rng(0).integers(-8, 8, (size, size), np.int8)
    scale = np.full((size // block, size), 0.01, np.float16)
    packed = helper.make_tensor("w", TensorProto.INT4, weight.shape, weight.ravel().tolist())
    inputs, outputs = [("x", FP16, [1, size])], [("y", FP16, [1, size])]
    matmul = helper.make_node("MatMul", ["x", "wf"], ["y"])
    dequantize = helper.make_node("DequantizeLinear", ["w", "s"], ["wf"], axis=0, block_size=block)
    int4 = build(save(tmp_path / "int4.onnx", [dequantize, matmul], inputs, outputs, {"w": packed, "s": scale}))
    fp16 = build(save(tmp_path / "fp16.onnx", [matmul], inputs, outputs, {"wf": weight.astype(np.float16)}))
    # What the engine holds beside the weights does not depend on their size: about 0.3 MB for a MatMul.
    assert fp16.bytes - int4.bytes > 0.7 * size * size * 2 * 0.75
    assert int4.details["weights_bytes"] < 0.3 * fp16.details["weights_bytes"]


@needs_rtx
def test_refused_ops_are_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("BitwiseNot", ["i"], ["flipped"], name="tome/flip"),
        helper.make_node("Unique", ["x"], ["kinds"], name="tome/kinds"),
    ]
    graph = save(
        tmp_path / "bad.onnx",
        nodes,
        [("x", FP16, [4]), ("i", TensorProto.INT32, [4])],
        [("flipped", TensorProto.INT32, [4]), ("kinds", FP16, ["m"])],
        {},
    )
    with pytest.raises(ExportError) as error:
        build(graph)
    assert "BitwiseNot 'tome/flip'" in str(error.value)
    assert "Unique 'tome/kinds'" in str(error.value)
    assert "2 problems" in str(error.value)
    assert left(graph) == []


@needs_rtx
def test_data_dependent_shape_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("NonZero", ["x"], ["where"], name="tome/pick")
    graph = save(tmp_path / "bad.onnx", [node], [("x", FP16, [4])], [("where", INT64, [1, "n"])], {})
    with pytest.raises(ExportError) as error:
        build(graph)
    assert "NonZero 'tome/pick': NonZero plugin" in str(error.value)
    assert "Assertion" not in str(error.value)
    assert "bad.onnx" in str(error.value)
    assert left(graph) == []


@needs_rtx
@pytest.mark.parametrize("damage", [lambda b: b[:300], lambda b: b"not a graph " * 20, lambda b: b""])
def test_damaged_graph(tmp_path: Path, damage: Any) -> None:
    graph = decoder(tmp_path / "lm.onnx")
    graph.write_bytes(damage(graph.read_bytes()))
    with pytest.raises(ExportError, match=r"lm\.onnx"):
        build(graph, PROFILES)
    assert left(graph) == []


@needs_rtx
def test_external_data(tmp_path: Path) -> None:
    graph = decoder(tmp_path / "lm.onnx")
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="lm.data", size_threshold=0)
    assert build(graph, PROFILES).details["weights_bytes"] >= DIM * DIM * 4 * 2
    (tmp_path / "lm.data").unlink()
    with pytest.raises(ExportError, match=r"lm\.onnx"):
        build(graph, PROFILES)


@needs_rtx
@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        ([], "give a shape profile"),
        ([ShapeProfile("p", {"input_embeds": (1, 1, DIM)})], "Did you mean 'inputs_embeds'"),
        ([ShapeProfile("p", {"inputs_embeds": (1, Range(1, 2, 4), DIM)})], "no ranges for past_key_0, past_value_0"),
        ([ranges("p", Range(8, 4, 64), 0)], "min 8 ≤ opt 4"),
        ([ShapeProfile("p", {**PROFILES[0].inputs, "inputs_embeds": (1, 4, 99)})], "fixed size 32, the profile 99"),
        ([ShapeProfile("p", {**PROFILES[0].inputs, "inputs_embeds": (1, 4)})], "2 axes given"),
    ],
)
def test_profiles_that_do_not_fit(tmp_path: Path, profiles: list[ShapeProfile], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build(decoder(tmp_path / "lm.onnx"), profiles)
    assert left(tmp_path / "lm.onnx") == []


@needs_rtx
def test_decode_fixed_at_one_token_is_warned_of(tmp_path: Path) -> None:
    log: list[str] = []
    build(decoder(tmp_path / "lm.onnx"), (PROFILES[0], ranges("decode", Range(1, 1, 1), Range(1, 32, 128))), log)
    assert "'decode' fixes seq at 1" in log[0]


@needs_rtx
def test_options_that_do_not_fit(tmp_path: Path) -> None:
    graph = decoder(tmp_path / "lm.onnx")
    with pytest.raises(UsageError, match="no compute capability 87"):
        build(graph, PROFILES, compute_capabilities=[80, 87])
    with pytest.raises(UsageError, match="expected a list"):
        build(graph, PROFILES, compute_capabilities=80)
    with pytest.raises(UsageError, match="Did you mean 'workspace_mib'"):
        build(graph, PROFILES, workspace=3)
    with pytest.raises(UsageError, match="Did you mean 'tensorrt_rtx'"):
        build(graph, PROFILES, module="tensorrt_rxt")


@needs_rtx
def test_weights_are_stripped_where_there_is_a_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "LIBRARY", "libno-such-driver.so.1")
    graph = decoder(tmp_path / "lm.onnx")
    with pytest.raises(EnvironmentMismatch, match=r"only where there is a GPU(.|\n)*Leave out --strip-weights"):
        build(graph, PROFILES, strip_weights=True)
    with pytest.raises(UsageError, match="strip_weights is 'yes'"):
        build(graph, PROFILES, strip_weights="yes")


@needs_rtx
@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "print('[I] parsing node 7', flush=True); import os; os.abort()",
            r"SIGABRT(.|\n)*crashed(.|\n)*parsing node 7",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "out of memory"),
        ("raise RuntimeError('odd')", r"exit code 1(.|\n)*RuntimeError: odd"),
    ],
)
def test_worker_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str) -> None:
    monkeypatch.setattr(trt, "WORKER", ("-c", script))
    graph = decoder(tmp_path / "lm.onnx")
    with pytest.raises(ExportError, match=words):
        build(graph, PROFILES)
    assert left(graph) == []


@needs_rtx
def test_interrupt_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "WORKER", ("-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"))
    graph, seen = decoder(tmp_path / "lm.onnx"), []

    def interrupt(line: str) -> None:
        seen.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trt.BACKEND.build(graph, ("decode",), PROFILES, tmp_path / "out", RTX, interrupt)
    assert left(graph) == []
    assert not Path(f"/proc/{seen[0]}").exists()


@needs_rtx
def test_header_check(tmp_path: Path) -> None:
    build(decoder(tmp_path / "lm.onnx"), PROFILES)
    engine = tmp_path / "out/lm.engine"
    trt.check_rtx_header(engine)
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-8])
    with pytest.raises(ExportError, match="torn"):
        trt.check_rtx_header(engine)
    engine.write_bytes(b"ftrt" + whole[4:])
    with pytest.raises(ExportError, match="no TensorRT-RTX engine"):
        trt.check_rtx_header(engine)


def test_what_is_missing_to_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "LIBRARY", "libno-such-driver.so.1")
    assert "this machine has no NVIDIA driver" in str(trt.BACKEND.missing_to_run())
    with pytest.raises(
        EnvironmentMismatch, match=r"lm\.engine cannot be run here\. TensorRT engines run on an NVIDIA GPU"
    ):
        trt.BACKEND.runner(Path("lm.engine"))


@needs_rtx
def test_a_real_engine_is_opened_by_its_module_and_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX's own runtime; the driver is a fake, so that it gets no further than opening."""
    build(decoder(tmp_path / "lm.onnx"), PROFILES)
    with fake_trt.installed(tmp_path), pytest.raises(EnvironmentMismatch) as refused:
        TensorRtRunner(tmp_path / "out/lm.engine").__enter__()
    assert re.search(r"lm\.engine does not open with tensorrt_rtx 1\..* on Fake GPU", str(refused.value))
    assert "edgetrim build" in str(refused.value)


def test_missing_names_both_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trt, "_installed", lambda module: False)
    assert "pip install tensorrt-rtx-cu13" in (trt.BACKEND.missing() or "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "JetPack" in (trt.BACKEND.missing() or "")
    with pytest.raises(EnvironmentMismatch, match="tensorrt_rtx"):
        build(decoder(tmp_path / "lm.onnx"), PROFILES)


def test_import_is_light() -> None:
    import subprocess

    script = "import sys, exporter.backends.trt; assert not {'torch', 'tensorrt_rtx', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_versions_compare() -> None:
    assert version("10.3.0") >= (10, 3) > version("10.1.0.27")
    assert version("11.4.0.106") > (10, 3)
