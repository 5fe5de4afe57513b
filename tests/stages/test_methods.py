"""Every method, as it stands in the exported graphs of real models: ONNX Runtime keeps the tokens PyTorch keeps, and
TensorRT-RTX takes the graph. Whole chains, language model included: test_fidelity.py.

The models: the embedded VLM with its trained weights and its own images (so scores are those of real features), and a
tiny model with a window-attention tower, no class token and t/h/w positions.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file

import exporter.embedded
from exporter.checkpoint import Checkpoint
from exporter.errors import UsageError
from exporter.families._contract import Request
from exporter.journal import Journal
from exporter.plan import Plan
from exporter.runtime import images
from exporter.stages import _task
from exporter.stages._modules import build_modules, load_reference, origins
from exporter.stages._store import WeightFile
from exporter.stages.export import draw_reduce, draw_vision
from graphs import _spec
from graphs._contract import InCache, InLLM
from tests.conftest import needs_rtx
from tests.families import tiny
from tests.stages.conftest import SIZES, objections

SPLIT = "name"
CLIP = 4
"""Frames of a clip, for both models."""
METHODS = [name for name in _spec.names() if not issubclass(_spec.load(name), InLLM | InCache)]
MODELS = ("embedded", "qwen2_5_vl")

REFUSED = {
    ("qwen2_5_vl", "lftr"): "it needs `cls`",
    **{
        ("qwen2_5_vl", name): "both sides must be even"
        for name in ("ldpv2", "llava_stf", "pixelshuffle", "qwen_merger")
    },
    ("qwen2_5_vl", "videoxl"): "must be even for clips",
    ("qwen2_5_vl", "sva"): "which `side` must divide",
    ("qwen2_5_vl", "hires"): "must divide both sides",
    ("qwen2_5_vl", "tokenpacker"): "must divide both sides",
    ("qwen2_5_vl", "qformer"): "it needs `cls`",
    **{("qwen2_5_vl", name): "it needs `cls`, `instruction_ids`" for name in ("qformer_text", "llamavid")},
    **{("embedded", name): "with a Q-Former's tokenizer in their folder" for name in ("qformer_text", "llamavid")},
    **{("qwen2_5_vl", name): "tower cannot be shortened" for name in METHODS if _spec.load(name).place == "in_tower"},
}
"""(model, method) that cannot be at its defaults: a part of the sentence that says why."""


def pairs() -> Iterator[Any]:
    """Every method on one of the models, in turn; the others are slow, in sum."""
    for number, name in enumerate(METHODS):
        fitting = [model for model in MODELS if (model, name) not in REFUSED]
        for model in fitting:
            few = model == fitting[number % len(fitting)]
            yield pytest.param(model, name, id=f"{model}-{name}", marks=() if few else pytest.mark.slow)


FITTING = list(pairs())


@dataclass(frozen=True)
class Drawn:
    """The vision and reduce graphs of one plan, with weights, and the same in PyTorch."""

    plan: Plan
    folder: Path

    @classmethod
    def of(cls, plan: Plan, folder: Path) -> Drawn:
        modules = build_modules(plan)
        vision = draw_vision(plan, modules.vision, torch.float32)
        reduce = draw_reduce(plan, modules.reduce, vision, torch.float32)
        known = origins(plan, modules)
        folder = folder / "graphs"
        folder.mkdir()
        journal = Journal(folder, {})
        for name, model in (("vision", vision), ("reduce", reduce)):
            with WeightFile(folder / f"{name}.data", journal, plan.checkpoint, known[name], torch.float32) as file:
                file.attach(model)
            ir.save(model, folder / f"{name}.onnx")
        return cls(plan, folder)

    def runtime(self, pixels: npt.NDArray[np.float32], side: dict[str, Any]) -> list[Any]:
        """The reduce graph's outputs, in ONNX Runtime from the pixels on."""
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1

        def run(role: str, feeds: dict[str, Any]) -> dict[str, Any]:
            session = ort.InferenceSession(self.folder / f"{role}.onnx", options, providers=["CPUExecutionProvider"])
            wanted = {i.name for i in session.get_inputs()}
            names = [o.name for o in session.get_outputs()]
            return dict(zip(names, session.run(None, {k: v for k, v in feeds.items() if k in wanted}), strict=True))

        return list(run("reduce", run("vision", {"pixel_values": pixels}) | side).values())

    def eager(self, pixels: npt.NDArray[np.float32], side: dict[str, Any]) -> list[Any]:
        modules = load_reference(self.plan)
        with torch.inference_mode():
            signals = modules.vision(torch.from_numpy(pixels))
            out = modules.reduce(*signals, *(torch.from_numpy(side[name]) for name in self.plan.side))
        return [x.numpy() for x in out]


@functools.cache
def planned(model: str, name: str, folder: Path, clip: Checkpoint | None, made: Path) -> Plan:
    """The method at half of the tokens, on an image if it can, else on a clip; a compressor with weights in `made`."""
    spec = _spec.sweep(name).format(ratio=0.5)
    if _spec.load(name).place == "projector":
        (step,) = tiny.unchecked(folder, (spec,), Request(CLIP, SIZES.get(model))).steps
        spec += f"{',' if ':' in spec else ':'}weights={tiny.weights(step, made / 'weights.safetensors')}"
    for frames in (1, CLIP):
        try:
            return tiny.plan(folder, (spec,), Request(frames, SIZES.get(model), clip))
        except UsageError as e:
            if "at least 2 frames" not in str(e) and "at least 2; found 1" not in str(e):
                raise
    raise AssertionError(f"{spec} takes neither an image nor a clip")


def samples(plan: Plan) -> npt.NDArray[np.float32]:
    """Two of them: float32 [2, frames, 3, height, width]. For the embedded model its own pictures."""
    image, frames = plan.geometry.image, plan.geometry.frames
    if plan.checkpoint.folder == exporter.embedded.CHECKPOINT:
        questions = _task.embedded(frames, 2)[-2:]
        return np.concatenate([images.preprocess(q.frames, image) for q in questions])
    shape = (2, frames, 3, image.height, image.width)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def sides(plan: Plan) -> dict[str, Any]:
    rng, site = np.random.default_rng(1), plan.geometry.tower
    mask = np.ones((2, 6), np.float32)
    mask[0, :2] = 0
    return {
        "text": rng.standard_normal((2, 6, plan.geometry.hidden)).astype(np.float32),
        "text_mask": mask,
        "aligned_text": rng.standard_normal((2, plan.geometry.shared)).astype(np.float32),
        "warp": rng.integers(-1, site.tokens, (2, site.frames, site.tokens)),
    }


@pytest.fixture(scope="session")
def drawn(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders = checkpoints | {"embedded": exporter.embedded.CHECKPOINT}
    clip = tmp_path_factory.mktemp("clip")
    tiny.clip(clip, hidden=128, layers=4)
    clips = {"embedded": Checkpoint(clip)}

    @functools.cache
    def run(model: str, name: str) -> Drawn:
        made = tmp_path_factory.mktemp(name)
        return Drawn.of(planned(model, name, folders[model], clips.get(model), made), made)

    return run


@pytest.mark.parametrize(("model", "name"), REFUSED)
def test_what_does_not_fit_is_refused_in_words(model: str, name: str, drawn: Any) -> None:
    with pytest.raises(UsageError, match=REFUSED[model, name]):
        drawn(model, name)


@pytest.mark.parametrize(("model", "name"), FITTING)
def test_the_graph_keeps_what_pytorch_keeps(model: str, name: str, drawn: Any) -> None:
    found: Drawn = drawn(model, name)
    pixels, side = samples(found.plan), sides(found.plan)
    embeds, index, *size = found.runtime(pixels, side)
    true_embeds, true_index, *true_size = found.eager(pixels, side)
    assert index.shape == (2, found.plan.kept)
    assert (index == true_index).all()
    assert np.abs(embeds - true_embeds).max() <= 1e-4 * np.abs(true_embeds).max()
    assert [(a == b).all() for a, b in zip(size, true_size, strict=True)] == [True] * found.plan.sized


@pytest.mark.parametrize(("model", "name"), FITTING)
def test_no_target_has_anything_against_it(model: str, name: str, drawn: Any) -> None:
    files = drawn(model, name).folder.glob("*.onnx")
    assert [objection for file in files for objection in objections(file)] == []


class Builder:
    """TensorRT-RTX in a process of its own, started again where a graph has killed it."""

    def __init__(self) -> None:
        self.worker: subprocess.Popen[str] | None = None

    def __call__(self, graph: Path) -> str:
        if self.worker is None or self.worker.poll() is not None:
            self.worker = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("rtx_worker.py")], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip
        assert self.worker.stdin is not None and self.worker.stdout is not None
        self.worker.stdin.write(f"{graph}\n")
        self.worker.stdin.flush()
        said = self.worker.stdout.readline()
        return str(json.loads(said)) if said else f"the builder's process ended with {self.worker.wait()}"

    def close(self) -> None:
        if self.worker is not None:
            self.worker.communicate()


@pytest.fixture(scope="session")
def rtx() -> Iterator[Builder]:
    builder = Builder()
    yield builder
    builder.close()


@needs_rtx
@pytest.mark.parametrize(("model", "name"), FITTING)
def test_tensorrt_rtx_builds_it(model: str, name: str, drawn: Any, rtx: Builder) -> None:
    role = "vision" if _spec.load(name).place == "in_tower" else "reduce"
    assert rtx(drawn(model, name).folder / f"{role}.onnx") == "built"


def test_trained_weights_come_from_their_file(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """A method's own tensors reach the graph and the reference alike, and matter."""
    folder = exporter.embedded.CHECKPOINT
    width = tiny.plan(folder, (), Request(CLIP)).geometry.tower.dim
    file = tmp_path / "inti.safetensors"
    save_file({"score_0": torch.randn(width, 3, generator=torch.Generator().manual_seed(0))}, file)
    out = {}
    for spec in (f"inti:stages=1,weights={file}", "inti:stages=1"):
        made = tmp_path / str(len(out))
        made.mkdir()
        found = Drawn.of(tiny.plan(folder, (spec,), Request(CLIP)), made)
        pixels = samples(found.plan)
        out[spec] = found.runtime(pixels, {})[0]
        expected = found.eager(pixels, {})[0]
        assert np.abs(out[spec] - expected).max() <= 1e-4 * np.abs(expected).max()
    one, other = out.values()
    assert np.abs(one - other).max() > 1e-2
    save_file({"score_0": torch.zeros(width, 4)}, file)
    for path, message in (
        (file, rf"Expected `score_0` \[{width}, 3\] \(found \[{width}, 4\]\)"),
        ("no.file", "cannot be read"),
    ):
        with pytest.raises((UsageError, Exception), match=message):
            tiny.plan(folder, (f"inti:stages=1,weights={path}",), Request(CLIP))
