"""Exports whose weights were chosen by what the calibration questions showed, on the embedded model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from exporter.backends.ort import OnnxRuntime
from exporter.errors import UsageError
from exporter.graphset import GraphSet
from exporter.job import Job
from exporter.journal import DataFile
from exporter.nn.decoder import Decoder
from exporter.plan import Plan
from exporter.quantize import gptq
from exporter.quantize._contract import Seen
from exporter.runtime import images
from exporter.runtime.generate import Generator, embedding
from exporter.runtime.sequence import split
from exporter.stages import _calibrate, _task
from exporter.stages._modules import load_reference
from exporter.stages._processor import prompt_of
from exporter.stages._reference import reference
from exporter.stages.export import export

REDUCTIONS = ("fastv:layer=2,keep=16",)
METHODS = ("rtn", "awq", "gptq")
LAYERS = 4


def plan_of(quantizer: str, error_max: float | None = None) -> Plan:
    plan = Job("embedded", REDUCTIONS, "cpu_int4", quantizer=quantizer).plan()
    precision = replace(plan.profile.precision, error_max=error_max)
    stack = replace(plan.profile.stack, flavour=None)
    return replace(plan, profile=replace(plan.profile, precision=precision, stack=stack))


@pytest.fixture(scope="module")
def calibration() -> list[_task.Question]:
    return _task.for_calibration(1, 24)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exported(
    calibration: list[_task.Question], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Plan, Path, GraphSet, list[str]]]:
    found = {}
    for name in METHODS:
        plan, folder, log = plan_of(name), tmp_path_factory.mktemp(name), []
        found[name] = plan, folder, export(plan, folder, log.append, calibration), log
    return found


def tensors(folder: Path) -> dict[str, npt.NDArray[Any]]:
    graph = onnx.load(folder / "prefill.onnx").graph
    return {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}


def logits(generator: Generator, plan: Plan, count: int = 40) -> npt.NDArray[np.float32]:
    """Behind held-out questions."""
    prompt, asked = prompt_of(plan), _task.embedded(1, count // 2)
    ids = [prompt.ask(q.question) for q in asked]
    pixels = np.concatenate([images.preprocess(q.frames, generator.graphs.image) for q in asked])
    visual = generator.reduce(generator.vision(pixels), split(ids, generator.graphs))
    return generator.prefill(visual, ids).logits


def engine(stack: ExitStack, folder: Path, graphs: GraphSet) -> Generator:
    backend, runners = OnnxRuntime(threads=1, accuracy_level=0), {}
    for file, roles in graphs.roles().items():
        runners |= dict.fromkeys(roles, stack.enter_context(backend.runner(folder / file)))
    return Generator(runners, graphs, embedding(folder, graphs))


def apart(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Squared error, relative. (A divergence would be that of the one or two questions whose answer changes.)"""
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


def test_calibrated_weights_say_more_nearly_what_the_model_says(exported: Any) -> None:
    plan = exported["rtn"][0]
    expected = logits(Generator(*reference(plan)), plan, 200)
    with ExitStack() as stack:
        error = {n: apart(logits(engine(stack, f, g), p, 200), expected) for n, (p, f, g, _) in exported.items()}
    assert error["gptq"] < 0.5 * error["rtn"]
    assert error["awq"] < 0.9 * error["rtn"]


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_the_graphs_compute_with_what_is_written(name: str, exported: Any) -> None:
    """PyTorch with the weights that stand in the files, read by onnx."""
    plan, folder, graphs, _ = exported[name]
    modules, stored = load_reference(plan), tensors(folder)
    for parameter_name, parameter in modules.decode.named_parameters():
        if parameter_name in stored:
            parameter.data = torch.from_numpy(stored[parameter_name].copy())
            continue
        q, scale = (stored[f"{parameter_name}.{suffix}"] for suffix in ("int4", "scale"))
        block = len(q) // len(scale)
        parameter.data = torch.from_numpy(q.astype(np.float32) * scale.repeat(block, 0))
    expected = logits(Generator(*reference(plan, modules)), plan)
    with ExitStack() as stack:
        found = logits(engine(stack, folder, graphs), plan)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


def test_awq_changes_norms_and_nothing_but_awq_does(exported: Any) -> None:
    plain, scaled, compensated = (tensors(exported[name][1]) for name in METHODS)
    norm = "layers.1.input_layernorm.weight"
    assert (plain[norm] == compensated[norm]).all()
    assert not np.allclose(plain[norm], scaled[norm])


def test_every_layer_is_watched_once_and_alone(
    calibration: list[_task.Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding is not counted; behind a cut, what was dropped is not; one layer at a time has weights."""
    plan, counts, present, decide = plan_of("gptq"), [], [], _calibrate._Layers._decide

    def watching(self: Any, i: int, layer: Any, seen: dict[Any, Seen]) -> Any:
        counts.append({s.count for s in seen.values()})
        decoder: Decoder = self.decoder
        here = [any(p.device.type != "meta" for p in other.parameters()) for other in decoder.layers]
        present.append((here.index(True), sum(here)))
        return decide(self, i, layer, seen)

    monkeypatch.setattr(_calibrate._Layers, "_decide", watching)
    export(plan, tmp_path, calibration=calibration)
    prompt = prompt_of(plan)
    lengths = [len(prompt.ask(q.question)) - 1 for q in calibration]
    assert len(set(lengths)) > 1
    before, behind = (sum(lengths) + kept * len(lengths) for kept in (64, 16))
    assert counts == [{before}, {before}, {behind}, {behind}]
    assert present == [(i, 1) for i in range(LAYERS)]


@pytest.mark.parametrize("dies_behind", [3, 17])
def test_a_killed_calibration_goes_on_with_the_layer_it_was_at(
    dies_behind: int, exported: Any, calibration: list[_task.Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer has seven tensors: two norms and five matrices."""
    plan, whole, _, first = exported["gptq"]
    write, left = DataFile._write, dies_behind

    def dying(self: Any, *rest: Any) -> Any:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return write(self, *rest)

    monkeypatch.setattr(DataFile, "_write", dying)
    with pytest.raises(KeyboardInterrupt):
        export(plan, tmp_path, calibration=calibration)
    monkeypatch.setattr(DataFile, "_write", write)
    log: list[str] = []
    export(plan, tmp_path, log.append, calibration)
    calibrated = [sum("calibrating layer" in line for line in lines) for lines in (first, log)]
    assert calibrated == [LAYERS, LAYERS - dies_behind // 7]
    for file in ("llm.data", "precision.json", "decode.onnx"):
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()


def test_other_questions_are_another_export(exported: Any, tmp_path: Path) -> None:
    assert _calibrate.fingerprint(_task.for_calibration(1, 4)) != _calibrate.fingerprint(_task.for_calibration(1, 8))


def test_sensitive_matrices_stay_as_they_are(exported: Any, calibration: list[_task.Question], tmp_path: Path) -> None:
    """Those whose output INT4 changes more than is allowed, and no others."""
    errors = {
        n: m["error"] for n, m in json.loads((exported["awq"][1] / "precision.json").read_text())["matrices"].items()
    }
    limit = sorted(errors.values())[-4] * 1.001
    log: list[str] = []
    export(plan_of("awq", limit), tmp_path, log.append, calibration)
    matrices = json.loads((tmp_path / "precision.json").read_text())["matrices"]
    kept = {name for name, m in matrices.items() if "kept" in m}
    assert 1 <= len(kept) <= 6
    assert all(matrices[name]["error"] > limit and "bits" not in matrices[name] for name in kept)
    assert all(m["error"] <= limit for name, m in matrices.items() if name not in kept)
    assert sum("stays as it is" in line for line in log) == len(kept)
    kinds = Counter(
        t.data_type for t in onnx.load(tmp_path / "decode.onnx", load_external_data=False).graph.initializer
    )
    assert kinds[onnx.TensorProto.INT4] == 5 * LAYERS - len(kept)


def test_a_quantiser_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pass --calibration"):
        export(plan_of("gptq"), tmp_path)


def test_a_quantiser_needs_int4(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="profile `cpu_fp32` has none"):
        Job("embedded", (), "cpu_fp32", quantizer="awq").plan()
    with pytest.raises(UsageError, match=r"Unknown quantizer 'gtpq'\. Did you mean 'gptq'"):
        Job("embedded", (), "cpu_int4", quantizer="gtpq").plan()


def test_the_embedded_default_asks_about_digits_that_are_not_evaluated() -> None:
    from exporter.embedded import digits

    ours = {e.frames.tobytes() for e in digits.seen("cell", 20)}
    assert ours.isdisjoint(e.frames.tobytes() for e in digits.held_out("cell", 20))
    assert gptq.QUANTIZER.gram
