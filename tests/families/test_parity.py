"""Our modules against Hugging Face's, on tiny random checkpoints that went to disk and came back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from exporter.embedded import CHECKPOINT
from exporter.families._contract import Request
from exporter.runtime import images
from exporter.runtime.generate import Generator
from exporter.runtime.sequence import arrange
from exporter.stages._reference import reference
from tests.families import tiny

TOLERANCE = 1e-4
NEW_TOKENS = 32


def ours(folder: Path, request: Request | None = None) -> Generator:
    """Our PyTorch modules with the weights of a folder, unreduced."""
    runners, graphs, table = reference(tiny.plan(folder, (), request))
    return Generator(runners, tiny.endless(graphs), table)


def relative(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(theirs: PreTrainedModel, generator: Generator) -> None:
    """Visual features, next-token logits and 32 greedy tokens."""
    asked = tiny.question(generator.graphs)
    arguments = asked.for_transformers(generator.graphs)
    theirs.generation_config.eos_token_id = None
    visual = generator.reduce(generator.vision(asked.pixels))
    with torch.no_grad():
        features = vision_features(theirs, arguments)
        logits = theirs(**arguments).logits[:, -1]
        tokens = theirs.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert relative(visual.embeds[0], features) <= TOLERANCE
    assert relative(generator.prefill(visual, [asked.prompt]).logits, logits) <= TOLERANCE
    result = generator.generate(asked.pixels, [asked.prompt], NEW_TOKENS)
    assert result.tokens == tokens[:, arguments["input_ids"].shape[1] :].tolist()
    assert len(set(result.tokens[0])) > 4, "a model that repeats itself shows nothing"


def vision_features(theirs: PreTrainedModel, arguments: dict[str, Any]) -> torch.Tensor:
    """[tokens, hidden] at the language model's width."""
    if "pixel_values_videos" in arguments:
        found = theirs.model.get_video_features(arguments["pixel_values_videos"], arguments["video_grid_thw"])
    elif "image_grid_thw" in arguments:
        found = theirs.model.get_image_features(arguments["pixel_values"], arguments["image_grid_thw"])
    else:
        found = theirs.model.get_image_features(arguments["pixel_values"])
    return torch.cat(tuple(found.pooler_output))


@pytest.mark.parametrize("decoder", tiny.DECODERS)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_llava(tower: str, decoder: str, tmp_path: Path) -> None:
    theirs = tiny.llava(tmp_path, tower, decoder)
    assert theirs.config.text_config.model_type == decoder
    compare(theirs, ours(tmp_path))


def test_llava_with_several_images(tmp_path: Path) -> None:
    compare(tiny.llava(tmp_path), ours(tmp_path, Request(frames=2)))


@pytest.mark.parametrize(
    ("size", "frames"),
    [
        pytest.param((112, 112), 1, id="whole windows"),
        pytest.param((140, 112), 1, id="windows cut by the border"),
        pytest.param((84, 140), 1, id="cut on both sides"),
        pytest.param((112, 112), 4, id="clip"),
    ],
)
def test_qwen2_5_vl(size: tuple[int, int], frames: int, tmp_path: Path) -> None:
    theirs = tiny.qwen2_5_vl(tmp_path)
    generator = ours(tmp_path, Request(frames, size))
    compare(theirs, generator)
    asked = tiny.question(generator.graphs)
    positions = rope_index(theirs, asked.for_transformers(generator.graphs))
    assert (in_prompt_order(generator, asked.prompt) == positions).all()


def rope_index(theirs: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    """[3, seq], from Hugging Face."""
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    found, _ = theirs.model.get_rope_index(**{name: arguments.get(name) for name in names})
    return found[:, 0].numpy()


def in_prompt_order(generator: Generator, prompt: list[int]) -> Any:
    """[3, seq], ours, sorted from visual-tokens-first to the prompt's order."""
    index = np.arange(generator.graphs.visual.total)[None]
    places = arrange([prompt], index, generator.graphs)
    return places.position_ids[:, 0, places.order[0].argsort()]


def test_pixels_are_those_of_the_image_processor(tmp_path: Path) -> None:
    """From an image file's pixels to the tower's input: resized, normalised, cut into patches."""
    tiny.qwen2_5_vl(tmp_path)
    graphs = ours(tmp_path, Request(1, (140, 112))).graphs
    pixels = np.random.default_rng(0).integers(0, 256, (140, 112, 3), np.uint8)
    theirs = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=1 << 20)(
        Image.fromarray(pixels), return_tensors="pt"
    )
    found = tiny.patches(images.preprocess([Image.fromarray(pixels)], graphs.image)[0])
    assert theirs["image_grid_thw"].tolist() == [[1, 10, 8]]
    assert (found - theirs["pixel_values"]).abs().max() <= 1e-6


@pytest.mark.parametrize("build", [tiny.llava, tiny.qwen2_5_vl])
def test_tied_head(build: Any, tmp_path: Path) -> None:
    """No head in the file: the embedding table takes its place."""
    theirs = build(tmp_path, tied=True)
    generator = ours(tmp_path, Request(1, None if build is tiny.llava else (112, 112)))
    assert (
        "head.weight" not in tiny.plan(tmp_path, (), Request(1, None if build is tiny.llava else (112, 112))).checkpoint
    )
    compare(theirs, generator)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="linear", factor=4.0, rope_theta=10000.0),
        dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500.0,
            original_max_position_embeddings=64,
        ),
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rope_scaling(rope: dict[str, Any], tmp_path: Path) -> None:
    compare(tiny.llava(tmp_path, rope_parameters=rope), ours(tmp_path))


def test_the_embedded_model() -> None:
    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    generator = ours(CHECKPOINT)
    asked = tiny.question(generator.graphs, text=(4, 20, 21, 22))
    visual = generator.reduce(generator.vision(asked.pixels))
    with torch.no_grad():
        logits = theirs(**asked.for_transformers(generator.graphs)).logits[:, -1]
    assert relative(generator.prefill(visual, [asked.prompt]).logits, logits) <= TOLERANCE
