"""A model type without a family: transformers' own modules, or a refusal in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from exporter.errors import CheckpointError, ExportError
from exporter.families._contract import Request
from exporter.families._traced import known
from tests.families import tiny
from tests.families.test_parity import compare, ours


@pytest.mark.parametrize("build", [tiny.aya_vision, tiny.got_ocr2])
def test_the_same_answers(build: Any, tmp_path: Path) -> None:
    """As with a family: features, logits, and 32 tokens; of two images, with windows and without."""
    theirs = build(tmp_path)
    generator = ours(tmp_path, Request(2))
    assert generator.graphs.family == f"{build.__name__} (traced)"
    compare(theirs, generator)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tome:keep=2", r"does not fit aya_vision \(traced\): its tower is transformers' own"),
        ("fastv:layer=1,keep=2", "its language model is transformers' own, traced whole"),
        ("lookm:keep_ratio=0.5", "its language model is transformers' own, traced whole"),
        ("visionzip:keep=2", "needs .*`column_attention`"),
        ("avgpool:keep=1", "needs the raster of the tokens, which is lost here"),
    ],
)
def test_what_it_cannot_be_reduced_by(spec: str, message: str, tmp_path: Path) -> None:
    tiny.aya_vision(tmp_path)
    with pytest.raises(ExportError, match=message):
        tiny.plan(tmp_path, (spec,))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("glm4v", "its positions have several axes"),
        ("mllama", "There is no family 'mllama', and .*not a tower whose features"),
    ],
)
def test_what_cannot_be_traced(kind: str, message: str, tmp_path: Path) -> None:
    assert known(kind)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match=message):
        tiny.plan(tmp_path)


def test_an_image_size_that_its_tower_does_not_take(tmp_path: Path) -> None:
    tiny.aya_vision(tmp_path)
    with pytest.raises(CheckpointError, match="images of 57 × 112 pixels fail there"):
        tiny.plan(tmp_path, (), Request(1, (57, 112)))


def test_a_checkpoint_that_does_not_say_how_images_are_normalised(tmp_path: Path) -> None:
    tiny.aya_vision(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"image_mean and image_std in preprocessor_config\.json"):
        tiny.plan(tmp_path)


def test_a_checkpoint_that_lacks_a_tensor(tmp_path: Path) -> None:
    """Where transformers would take random numbers."""
    tiny.aya_vision(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if "self_attn.q_proj" in name)
    save_file({n: t for n, t in tensors.items() if n != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, such as `model\..*self_attn\.q_proj"):
        ours(tmp_path)
