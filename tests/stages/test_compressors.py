"""Trained projectors that shorten, in whole chains: the engine against PyTorch; each compressor alone: test_methods.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.errors import UsageError
from exporter.families._contract import Request
from tests.families import tiny
from tests.stages.conftest import SIZES, Engine, Export

ANSWER = 64


@pytest.fixture(scope="module")
def with_weights(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, spec, frames) → the spec with a file of random weights in it."""

    def make(family: str, spec: str, frames: int = 1) -> str:
        plan = tiny.unchecked(checkpoints[family], (spec,), Request(frames, SIZES.get(family)))
        return f"{spec}{',' if ':' in spec else ':'}weights={tiny.weights(plan.steps[0], tmp_path_factory.mktemp('weights') / 'w.safetensors')}"

    return make


@pytest.mark.parametrize(
    ("family", "spec", "more", "frames"),
    [
        ("llava", "ldpv2", (), 1),
        ("llava", "ldpv2", (), 3),
        ("llava", "ldpv2", ("divprune:keep=2", "fastv:keep=1"), 1),
        ("llava", "ldpv2", ("fastv:keep=3",), 3),
        ("qwen2_5_vl", "mqt:keep=6", (), 1),
        ("qwen2_5_vl", "mqt:keep=6", ("divprune:keep=4", "fastv:keep=5"), 4),
    ],
)
def test_onnx_runtime_equals_pytorch(
    family: str, spec: str, more: tuple[str, ...], frames: int, with_weights: Any, exported: Export, engine: Engine
) -> None:
    case = exported(family, (with_weights(family, spec, frames), *more), frames)
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 1, (20, 21, 22, 23, 24))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    theirs, ours = case.theirs().generate(pixels, prompts, ANSWER), engine(case).generate(pixels, prompts, ANSWER)
    assert ours.tokens == theirs.tokens
    for name, kept in theirs.kept.items():
        assert (ours.kept[name] == kept).all()
    assert "projector" not in (case.folder / "reduce.onnx").read_bytes().decode("latin1").replace("mm_projector", "")


def test_the_model_reads_it_as_if_the_tower_had_given_so_many(
    with_weights: Any, exported: Export, engine: Engine
) -> None:
    """Three images of four tokens each, by Hugging Face's language model on prompts with so many placeholders."""
    from tests.stages import uncached

    case = exported("llava", (with_weights("llava", "ldpv2", 3),), 3)
    ours, asked = engine(case), tiny.question(case.graphs)
    features = torch.from_numpy(ours.reduce(ours.vision(asked.pixels)).embeds)
    assert case.graphs.visual.total == case.graphs.visual.kept == features.shape[1] == 12
    text = uncached.load("llava", case.plan.checkpoint.folder).model.language_model
    head = uncached.load("llava", case.plan.checkpoint.folder).lm_head
    image = case.graphs.text.image_token
    ids = [token for t in asked.prompt for token in ([image] * 4 if t == image else [t])]
    expected: list[int] = []
    with torch.no_grad():
        for _ in range(ANSWER):
            row = torch.tensor([ids + expected])
            embeds = text.embed_tokens(row)
            embeds[0, [i for i, token in enumerate(ids) if token == image]] = features[0]
            logits = head(text(inputs_embeds=embeds, attention_mask=torch.ones_like(row)).last_hidden_state[:, -1])
            expected.append(int(logits.argmax()))
    assert ours.generate(asked.pixels, [asked.prompt], ANSWER).tokens == [expected]


def test_weights_may_be_a_published_checkpoint(
    with_weights: Any, exported: Export, tmp_path: Path, checkpoints: Any
) -> None:
    """Its names have a prefix there, and it is a folder with many other tensors."""
    spec = with_weights("llava", "ldpv2")
    file = spec.partition("=")[2]
    published = {f"model.mm_projector.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(published | {"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "anything"}')
    one, other = exported("llava", (spec,)), exported("llava", (f"ldpv2:weights={tmp_path}",))
    assert (one.folder / "reduce.data").read_bytes() == (other.folder / "reduce.data").read_bytes()


def test_what_does_not_fit_is_refused_in_words(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def refused(*specs: str, family: str = "llava") -> str:
        with pytest.raises(UsageError) as found:
            tiny.plan(checkpoints[family], specs, Request(1, SIZES.get(family)))
        return str(found.value)

    assert "the model's own checkpoint, does not fit this model" in refused("ldpv2")
    assert "ldpv2:weights=FILE" in refused("ldpv2")
    assert "Put it first" in refused("divprune:keep=4", "ldpv2")
    assert "whole raster" in refused("uniform:keep=4", "ldpv2")
    folder = tmp_path / "next"
    tiny.llava_next(folder)
    with pytest.raises(UsageError, match="gives row ends or class tokens"):
        tiny.plan(folder, ("ldpv2",))


@pytest.mark.parametrize(
    ("family", "spec", "frames", "kept"),
    [("llava", "stc", 4, 27), ("llava", "videoxl", 5, 8), ("qwen2_5_vl", "stc", 4, 18)],
)
def test_a_clip_becomes_other_frames(
    family: str, spec: str, frames: int, kept: int, with_weights: Any, exported: Export, engine: Engine
) -> None:
    """Fewer frames than the tower's: not a number per placeholder any more, so they are counted anew."""
    case = exported(family, (with_weights(family, spec, frames),), frames)
    assert (case.graphs.visual.kept, case.plan.policy) == (kept, "compact")
    asked = tiny.question(case.graphs)
    theirs, ours = (g.generate(asked.pixels, [asked.prompt], ANSWER) for g in (case.theirs(), engine(case)))
    assert ours.tokens == theirs.tokens
