"""Our modules against Hugging Face's, on tiny random checkpoints that went to disk and came back."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Gemma2ForCausalLM, Gemma3ForCausalLM, PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from exporter.checkpoint import Checkpoint
from exporter.embedded import CHECKPOINT
from exporter.errors import UsageError
from exporter.families import llava
from exporter.families._contract import Request, decoder_spec
from exporter.nn.decoder import Decoder
from exporter.runtime import images
from exporter.runtime.generate import Generator
from exporter.runtime.sequence import arrange
from exporter.stages._reference import reference
from exporter.weights import load, text_embeddings
from tests.families import hugging_face, tiny
from tests.graphs.test_tokenpacker import Reference

TOLERANCE = 1e-4
HALVES = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
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
    arguments = hugging_face.arguments(asked, generator.graphs)
    for module in theirs.modules():  # a language model inside may have one of its own
        if getattr(module, "generation_config", None) is not None:
            module.generation_config.eos_token_id = None
    visual = generator.reduce(generator.vision(asked.pixels), None, asked.side)
    with torch.no_grad():
        features = vision_features(theirs, arguments)
        logits = theirs(**arguments).logits[:, -1]
        tokens = theirs.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False)
    width = generator.graphs.text.hidden
    order = arrange([asked.prompt], visual.index, generator.graphs).order[0, : visual.index.shape[1]].argsort()
    assert relative(visual.embeds[0, order, :width], features[0]) <= TOLERANCE
    for plane, wanted in enumerate(features[1:], 1):
        assert relative(visual.embeds[0, :, plane * width :][:, :width], wanted) <= TOLERANCE
    assert relative(generator.prefill(visual, [asked.prompt]).logits, logits) <= TOLERANCE
    result = generator.generate(asked.pixels, [asked.prompt], NEW_TOKENS, side=asked.side)
    assert result.tokens == tokens[:, arguments["input_ids"].shape[1] :].tolist()
    assert len(set(result.tokens[0])) > 4, "a model that repeats itself shows nothing"


def vision_features(theirs: PreTrainedModel, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """[tokens, hidden] at the language model's width; then what the first layers get, if they get anything."""
    if "video_grid_thw" in arguments:
        found = theirs.model.get_video_features(arguments["pixel_values_videos"], arguments["video_grid_thw"])
    elif "pixel_values_videos" in arguments:
        found = theirs.model.get_video_features(arguments["pixel_values_videos"])
    elif "image_grid_thw" in arguments:
        found = theirs.model.get_image_features(arguments["pixel_values"], arguments["image_grid_thw"])
    elif "qformer_input_ids" in arguments:
        names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
        found = theirs.get_image_features(**{name: arguments[name] for name in names})
    else:
        more = {name: arguments[name] for name in ("image_sizes", "batch_num_images") if name in arguments}
        found = getattr(theirs, "model", theirs).get_image_features(arguments["pixel_values"], **more)
    planes = getattr(found, "deepstack_features", None) or ()
    return [torch.cat(tuple(part)) for part in (found.pooler_output, *planes)]


@pytest.mark.parametrize("decoder", tiny.DECODERS)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_llava(tower: str, decoder: str, tmp_path: Path) -> None:
    theirs = tiny.llava(tmp_path, tower, decoder)
    assert theirs.config.text_config.model_type == decoder
    compare(theirs, ours(tmp_path))


@pytest.mark.parametrize(
    ("decoder", "text"),
    [
        ("qwen3", dict(use_sliding_window=True, sliding_window=tiny.WINDOW, max_window_layers=1)),
        ("qwen3", dict(attention_bias=True)),
        ("gemma", dict(attention_bias=True, num_key_value_heads=1)),
        ("gemma2", dict(sliding_window=64)),
        ("gemma2", dict(layer_types=["full_attention", *["sliding_attention"] * 3], attn_logit_softcapping=None)),
        ("gemma3_text", dict(sliding_window=64)),
        ("gemma3_text", dict(sliding_window_pattern=6)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_what_a_decoder_can_be_set_to(decoder: str, text: dict[str, Any], tmp_path: Path) -> None:
    """Windows shorter and longer than the prompt among them."""
    compare(tiny.llava(tmp_path, decoder=decoder, **text), ours(tmp_path))


@pytest.mark.parametrize("theirs", [Gemma2ForCausalLM, Gemma3ForCausalLM])
def test_a_head_with_a_cap(theirs: type[PreTrainedModel], tmp_path: Path) -> None:
    """LLaVA's head bends no logits, whatever its decoder's own head does: so the language model alone."""
    kind = theirs.config_class.model_type
    text = tiny.text_config(kind) | dict(final_logit_softcapping=2.0)
    model = tiny.saved(theirs(theirs.config_class(**text)), tmp_path)
    checkpoint = Checkpoint(tmp_path).named(lambda name: re.sub("^model", "text", name).replace("lm_head", "head"))
    spec = decoder_spec(checkpoint.config)
    ids = torch.arange(20)[None] * 7 % tiny.VOCAB
    embeds = text_embeddings(checkpoint.tensor("text.embed_tokens.weight"), spec)[ids]
    with torch.no_grad():
        found = load(Decoder(spec), "text", checkpoint)(embeds, *[torch.arange(20)[None]] * 2)[0]
        expected = model(ids).logits[:, -1]
    assert expected.abs().max() > 1
    assert relative(found, expected) <= TOLERANCE
    assert llava.FAMILY.decoder(checkpoint).logit_cap is None


@pytest.mark.parametrize(
    ("build", "frames", "size"),
    [
        pytest.param(tiny.smolvlm, 1, None, id="smolvlm"),
        pytest.param(tiny.smolvlm, 3, None, id="smolvlm clip"),
        pytest.param(tiny.idefics3, 1, (56, 112), id="idefics3 of tiles"),
        pytest.param(tiny.internvl, 1, None, id="internvl"),
        pytest.param(partial(tiny.internvl, decoder="qwen3"), 1, (112, 56), id="internvl of tiles"),
        pytest.param(
            partial(tiny.internvl, decoder="llama", norm_type="rms_norm", use_qk_norm=True, attention_bias=False), 2, None,
            id="internvl of 6B, of a clip",
        ),
        pytest.param(tiny.internvl_chat, 1, (112, 56), id="internvl_chat of tiles"),
        pytest.param(
            partial(tiny.internvl_chat, decoder="qwen3", norm_type="rms_norm", use_qk_norm=True, attention_bias=False), 2, None,
            id="internvl_chat with the large tower's norms",
        ),
        pytest.param(tiny.internvl, 2, (56, 56), id="internvl of two images"),
        pytest.param(partial(tiny.internvl, use_mean_pooling=False), 1, None, id="internvl with a last norm"),
        pytest.param(tiny.llava_next, 1, (112, 168), id="llava_next"),
        pytest.param(tiny.instructblip, 1, None, id="instructblip"),
        pytest.param(tiny.blip_2, 1, None, id="blip_2"),
        pytest.param(partial(tiny.mobilevlm, version=1), 1, None, id="mobilevlm"),
        pytest.param(tiny.mobilevlm, 2, None, id="mobilevlm v2 of two images"),
        pytest.param(tiny.llava_llama, 2, None, id="llava_llama of two images"),
        pytest.param(tiny.mistral3, 1, (84, 140), id="mistral3"),
        pytest.param(tiny.mistral3, 2, (56, 84), id="mistral3 of two images"),
        pytest.param(tiny.gemma3, 3, None, id="gemma3 of three images"),
        pytest.param(partial(tiny.gemma3, sliding_window=4), 2, None, id="gemma3 of two images, short windows"),
        pytest.param(tiny.paligemma, 1, None, id="paligemma"),
        pytest.param(partial(tiny.paligemma, decoder="gemma2", sliding_window=64), 2, None, id="paligemma 2 of two images"),
        pytest.param(tiny.llava_next, 2, (112, 56), id="llava_next of two images"),
        pytest.param(tiny.llava_next_video, 1, (112, 56), id="llava_next_video of an image"),
        pytest.param(tiny.llava_next_video, 4, None, id="llava_next_video"),
        pytest.param(tiny.fast_vlm, 2, (128, 192), id="fast_vlm of two images"),
        pytest.param(tiny.fast_vlm, 1, None, id="fast_vlm"),
        pytest.param(tiny.video_llava, 1, None, id="video_llava of an image"),
        pytest.param(tiny.video_llava, 4, None, id="video_llava"),
        pytest.param(tiny.llava_onevision, 1, (56, 112), id="llava_onevision of tiles"),
        pytest.param(tiny.llava_onevision, 3, (56, 56), id="llava_onevision of three images"),
        pytest.param(tiny.llava_onevision, 4, None, id="llava_onevision of a clip"),
        pytest.param(partial(tiny.llava_onevision, side=70), 2, None, id="llava_onevision of a clip with an odd raster"),
    ],
)  # fmt: skip
def test_families(build: Any, frames: int, size: tuple[int, int] | None, tmp_path: Path) -> None:
    compare(build(tmp_path), ours(tmp_path, Request(frames, size)))


class Packer(Reference):
    """TokenPacker's, of the tiny tower's patches: its two blocks have the published tower's 11 and 15, 21, 22."""

    reads = (-2, 1, 2, 2, 2)

    def __init__(self, dim: int, llm_dim: int) -> None:
        super().__init__(2, 4, 1, dim, dim, llm_dim)

    def forward(self, x: torch.Tensor, *levels: torch.Tensor) -> torch.Tensor:
        return super().forward(x, torch.cat(levels, -1), (4, 4))


def test_a_checkpoint_with_a_compressor_of_its_own(tmp_path: Path) -> None:
    """Known by its tensors, which config.json does not tell, and found under their published names."""
    theirs: Any = tiny.llava_llama(tmp_path, projector=Packer)
    generator = ours(tmp_path, Request(2))
    assert generator.graphs.visual.kept == 2 * 4
    compare(theirs, generator)


def test_a_conversation_that_outgrows_its_positions(tmp_path: Path) -> None:
    """OPT's table has rows for `max_position_embeddings` tokens."""
    tiny.llava(tmp_path, decoder="opt", max_position_embeddings=24)
    generator = ours(tmp_path)
    asked = tiny.question(generator.graphs)  # 16 visual tokens, and 5 of text
    assert len(generator.generate(asked.pixels, [asked.prompt], 4).tokens[0]) == 4
    with pytest.raises(UsageError, match="comes to 25 tokens; this model has positions for 24"):
        generator.generate(asked.pixels, [asked.prompt], 5)


def test_llava_with_several_images(tmp_path: Path) -> None:
    compare(tiny.llava(tmp_path), ours(tmp_path, Request(frames=2)))


@pytest.mark.parametrize(
    ("build", "size", "frames"),
    [
        pytest.param(tiny.qwen2_5_vl, (112, 112), 1, id="whole windows"),
        pytest.param(tiny.qwen2_5_vl, (140, 112), 1, id="windows cut by the border"),
        pytest.param(tiny.qwen2_5_vl, (84, 140), 1, id="cut on both sides"),
        pytest.param(tiny.qwen2_5_vl, (112, 112), 4, id="clip"),
        pytest.param(tiny.qwen2_vl, (84, 140), 1, id="qwen2_vl"),
        pytest.param(tiny.qwen2_vl, (112, 112), 4, id="qwen2_vl of a clip"),
        pytest.param(tiny.qwen3_vl, (84, 140), 1, id="qwen3_vl"),
        pytest.param(tiny.qwen3_vl, (112, 84), 4, id="qwen3_vl of a clip"),
    ],
)
def test_qwen(build: Any, size: tuple[int, int], frames: int, tmp_path: Path) -> None:
    theirs = build(tmp_path)
    generator = ours(tmp_path, Request(frames, size))
    compare(theirs, generator)
    asked = tiny.question(generator.graphs)
    positions = rope_index(theirs, hugging_face.arguments(asked, generator.graphs))
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


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pixels_are_those_of_the_image_processor(family: str, tmp_path: Path) -> None:
    """From an image file's pixels to the tower's input: resized, normalised, cut into patches."""
    getattr(tiny, family)(tmp_path)
    processor = Qwen2VLImageProcessorPil(
        min_pixels=28 * 28, max_pixels=1 << 20, patch_size=tiny.PATCH, **(HALVES if family == "qwen3_vl" else {})
    )
    processor.save_pretrained(tmp_path)
    graphs = ours(tmp_path, Request(1, (140, 112))).graphs
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 100, 3), np.uint8))
    theirs = processor(picture, return_tensors="pt")
    found = hugging_face.patches(images.preprocess([picture], graphs.image)[0])
    assert theirs["image_grid_thw"].tolist() == [[1, 10, 8]]
    assert (found - theirs["pixel_values"]).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("build", "request_"),
    [
        pytest.param(tiny.llava, Request(), id="llava"),
        pytest.param(partial(tiny.llava, decoder="gemma"), Request(), id="gemma"),
        pytest.param(tiny.qwen2_5_vl, Request(1, (112, 112)), id="qwen2_5_vl"),
    ],
)
def test_tied_head(build: Any, request_: Request, tmp_path: Path) -> None:
    """No head in the file: the embedding table takes its place, as it is where text embeddings are scaled."""
    theirs = build(tmp_path, tied=True)
    assert "head.weight" not in tiny.plan(tmp_path, (), request_).checkpoint
    compare(theirs, ours(tmp_path, request_))


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
    visual = generator.reduce(generator.vision(asked.pixels), None, asked.side)
    with torch.no_grad():
        logits = theirs(**hugging_face.arguments(asked, generator.graphs)).logits[:, -1]
    assert relative(generator.prefill(visual, [asked.prompt]).logits, logits) <= TOLERANCE
