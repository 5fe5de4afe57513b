"""What a model sees and reads is what its own processor makes of an image and of the chat template's image token."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
from jinja2 import Template
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

from exporter.errors import CheckpointError, UsageError
from exporter.families import smolvlm
from exporter.families._contract import Geometry, Request
from exporter.runtime import images
from exporter.runtime.prompt import Prompt
from exporter.stages._processor import prompt_of
from tests.families import tiny
from tests.runtime.test_prompt import llama_like, save

SIDE = 56
TOKENS = 4
"""Visual tokens of a tile."""
ONE, GRID = (SIDE, SIDE), (2 * SIDE, 3 * SIDE)
OF_ONEVISION = LlavaOnevisionImageProcessorPil(
    size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=tiny.PINPOINTS
)  # fmt: skip
OF_IDEFICS = dict(max_image_size={"longest_edge": SIDE}, size={"longest_edge": 3 * SIDE})


def of_idefics(kind: Any) -> Callable[[int, int], str]:
    processor: Any = SimpleNamespace(
        fake_image_token="<fake_token_around_image>", image_token="<image>", image_seq_len=TOKENS,
        global_image_token="<global-img>", global_image_tag="<global-img>",
    )  # fmt: skip

    def text(rows: int, cols: int) -> str:
        split = rows * cols > 1
        found: str = kind.replace_image_token(processor, {"rows": [[rows * split]], "cols": [[cols * split]]}, 0)
        return found

    return text


def of_internvl(rows: int, cols: int) -> str:
    processor: Any = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>", image_seq_length=TOKENS
    )
    tiles = rows * cols
    return InternVLProcessor.replace_image_token(processor, {"num_patches": [tiles + (tiles > 1)]}, 0)


@dataclass(frozen=True)
class Case:
    family: str
    size: tuple[int, int] | None
    """What --image-size says; None: nothing."""
    picture: tuple[int, int]
    """Width and height of a picture of which the processor makes that."""
    processor: Any
    token: str = ""
    text: Callable[[int, int], str] | None = None
    """What it writes for an image of so many tiles, if that is not just the token."""
    tiles: tuple[int, int] = (1, 1)
    together: bool = False
    """Whether it makes something else of several images than of each."""


CASES = [
    *(
        Case(family, size, picture, kind(do_image_splitting=tiles != (1, 1), **OF_IDEFICS), "<image>", of_idefics(text), tiles)
        for family, kind, text in (
            ("smolvlm", SmolVLMImageProcessorPil, SmolVLMProcessor),
            ("idefics3", Idefics3ImageProcessorPil, Idefics3Processor),
        )
        for size, picture, tiles in ((None, (61, 47), (1, 1)), (ONE, (30, 90), (1, 1)), (GRID, (100, 60), (2, 3)))
    ),
    *(
        Case(
            family, size, picture,
            GotOcr2ImageProcessorPil(
                size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=tiles[0] * tiles[1],
                min_patches=tiles[0] * tiles[1], image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
            ),
            "<IMG_CONTEXT>", of_internvl, tiles,
        )
        for family in ("internvl", "internvl_chat")
        for size, picture, tiles in ((None, (61, 47), (1, 1)), (GRID, (96, 65), (2, 3)))
    ),
    Case("llava_next", GRID, (336, 224), LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=tiny.PINPOINTS,
    ), tiles=(2, 3)),
    Case("llava_onevision", GRID, (336, 224), OF_ONEVISION, tiles=(2, 3)),
    Case("llava_onevision", ONE, (61, 46), OF_ONEVISION, together=True),
    Case("llava_onevision", None, (61, 46), SiglipImageProcessorPil(  # its video processor does the same, in torchvision
        size={"height": SIDE, "width": SIDE}, resample=3, image_mean=OF_ONEVISION.image_mean, image_std=OF_ONEVISION.image_std,
    )),
    Case("video_llava", None, (61, 90), VideoLlavaImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
    )),
    Case("fast_vlm", None, (90, 75), CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.0] * 3, image_std=[1.0] * 3,
    )),
    Case("gemma3", None, (61, 47), Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})),
    Case("llava_next_video", None, (61, 90), CLIPImageProcessorPil(  # its video processor does the same, in torchvision
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
    )),
    Case("blip_2", None, (61, 47), BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})),
    Case("instructblip", None, (61, 47), BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})),
    Case("paligemma", None, (61, 47), SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=3)),
]  # fmt: skip


def geometry(case: Case, folder: Path, frames: int = 1) -> Geometry:
    getattr(tiny, case.family)(folder)
    case.processor.save_pretrained(folder)
    return tiny.plan(folder, (), Request(frames, case.size)).geometry


def named(case: Case) -> str:
    return f"{case.family}-{case.tiles[0]}x{case.tiles[1]}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_pixels(case: Case, tmp_path: Path) -> None:
    """Of two pictures, one after another."""
    rng = np.random.default_rng(0)
    shape = (*case.picture[::-1], 3)
    pictures = [Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for _ in range(2)]
    given = [pictures] if case.together else [[picture] for picture in pictures]
    made = case.processor(given, return_tensors="np")
    wanted = made.get("pixel_values", made.get("pixel_values_images"))
    g = geometry(case, tmp_path, frames=2)
    found = images.preprocess(pictures, g.image)
    assert found.shape == (1, g.frames, 3, g.image.height, g.image.width)
    assert np.array_equal(found[0], np.asarray(wanted).reshape(found.shape[1:]))


@pytest.mark.parametrize("case", [case for case in CASES if case.text], ids=named)
def test_text(case: Case, tmp_path: Path) -> None:
    """An image token stands for all tokens of a tile."""
    assert case.text is not None
    g = geometry(case, tmp_path)
    assert g.written.count(case.token) == g.placeholders == g.image.parts
    assert g.written.replace(case.token, case.token * TOKENS) == case.text(*case.tiles)
    assert g.mark == case.token


def test_mistral3_sees_a_picture_row_by_row(tmp_path: Path) -> None:
    """Pixels of a picture whose own size is the exported one, rounded up; text with a break behind every row."""
    tiny.mistral3(tmp_path)
    processor: Any = PixtralImageProcessorPil(size={"longest_edge": 140}, patch_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 130, 3), np.uint8))
    wanted = processor([[picture]], return_tensors="np")
    g = tiny.plan(tmp_path, (), Request(1, (84, 140))).geometry
    assert np.asarray(wanted["image_sizes"]).reshape(-1).tolist() == [84, 140]
    assert np.array_equal(
        images.preprocess([picture], g.image)[0], np.asarray(wanted["pixel_values"]).reshape(1, 3, 84, 140)
    )
    rows = [*["[IMG]"] * 5, "[IMG_BREAK]"] * 3  # the processor itself wants torchvision
    assert g.written.replace("[IMG]", "[IMG]" * 5) == "".join([*rows[:-1], "[IMG_END]"])
    assert (g.mark, g.placeholders) == ("[IMG]", 3)


def test_gemma3_puts_an_image_between_empty_lines(tmp_path: Path) -> None:
    tiny.gemma3(tmp_path)
    g = tiny.plan(tmp_path).geometry
    assert (g.mark, g.written) == ("<start_of_image>", "\n\n<start_of_image><image_soft_token><end_of_image>\n\n")


def test_paligemma_has_a_template_of_its_own(tmp_path: Path) -> None:
    """Images, beginning of text, task, line break; and nothing that the tokenizer adds."""
    tiny.paligemma(tmp_path / "model")
    template = tiny.plan(tmp_path / "model").geometry.template
    hf = save(tmp_path / "text", llama_like, None)
    prompt = Prompt.load(tmp_path / "text", "<image>", template=template)
    wanted = hf("<image><image><s>caption en\n", add_special_tokens=False)["input_ids"]
    assert prompt.ask("caption en", placeholders=2) == wanted
    with pytest.raises(UsageError, match="no conversations"):
        prompt.follow(prompt.question("caption en"), "a cat", "and now?")


def test_instructblip_has_a_template_of_its_own(tmp_path: Path) -> None:
    """Queries, even before the beginning of text, as its processor puts them there; then the question."""
    tiny.instructblip(tmp_path / "model")
    template = tiny.plan(tmp_path / "model").geometry.template
    hf = save(tmp_path / "text", llama_like, None)
    prompt = Prompt.load(tmp_path / "text", "<image>", template=template)
    assert prompt.ask("what is this?") == hf("<image><s>what is this?", add_special_tokens=False)["input_ids"]
    with pytest.raises(UsageError, match="no conversations"):
        prompt.follow(prompt.question("what is this?"), "a cat", "and now?")


def test_blip_2_asks_as_its_paper_does(tmp_path: Path) -> None:
    """Queries before the beginning of text, as its processor puts them; earlier turns in the same words."""
    tiny.blip_2(tmp_path / "model")
    template = tiny.plan(tmp_path / "model").geometry.template
    hf = save(tmp_path / "text", llama_like, None)
    prompt = Prompt.load(tmp_path / "text", "<image>", template=template)
    wanted = "<image><s>Question: what is this? Answer:"
    asked = prompt.question("what is this?")
    assert prompt.encode(asked) == hf(wanted, add_special_tokens=False)["input_ids"]
    longer, _ = prompt.follow(asked, "a cat", "and now?")
    assert prompt.render(longer) == f"{wanted} a cat. Question: and now? Answer:"


def test_mobilevlm_cuts_the_prompt_where_an_image_stands(tmp_path: Path) -> None:
    """As the published code does it with SentencePiece: every part encoded apart, the image's number between them."""
    tiny.mobilevlm(tmp_path)
    pieces = sentence_piece(tmp_path)
    prompt = prompt_of(tiny.plan(tmp_path))
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    first, behind = f"{system}USER: ", "\nWhat is\n the größe? ASSISTANT:"
    asked = prompt.question("What is\n the größe?")
    wanted = [1, *pieces.encode(first), -200, *pieces.encode(behind)]
    assert prompt.encode(asked) == wanted
    assert prompt.ask("Two?", 2)[len(pieces.encode(first)) + 1 :][:4] == [-200, *pieces.encode("\n"), -200]
    assert prompt.decode(pieces.encode("the größe")) == "the größe"
    longer, new = prompt.follow(asked, "The cat.", "And now?")
    assert prompt.render(longer) == f"{first}<image>{behind} The cat.</s>USER: And now? ASSISTANT:"
    assert new == [2, *pieces.encode("USER: And now? ASSISTANT:")]


def test_mobilevlm_makes_a_square(tmp_path: Path) -> None:
    """In the colour of the mean, the picture in its middle; then CLIP's processor."""
    tiny.mobilevlm(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = np.random.default_rng(0).integers(0, 256, (47, 90, 3), np.uint8)
    square = np.empty((90, 90, 3), np.uint8)
    square[:] = [int(255 * mean) for mean in processor.image_mean]
    square[21 : 21 + 47] = pixels
    wanted = processor([[Image.fromarray(square)]], return_tensors="np")["pixel_values"]
    found = images.preprocess([Image.fromarray(pixels)], tiny.plan(tmp_path).geometry.image)
    assert np.array_equal(found[0], np.asarray(wanted).reshape(1, 3, SIDE, SIDE))


def sentence_piece(folder: Path) -> Any:
    """A tokenizer as checkpoints of 2023 have it, SentencePiece's file and who the special tokens are, and SentencePiece itself."""
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["What is the cat?", "USER: hat ASSISTANT: A chat between a curious user"] * 9),
            model_writer=file, vocab_size=310, model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    said = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_a_tokenizer_that_cannot_be_converted(tmp_path: Path) -> None:
    tiny.mobilevlm(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"tokenizer.model cannot be converted"):
        prompt_of(tiny.plan(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer"}))
    with pytest.raises(CheckpointError, match=r"converted for LlamaTokenizer; found 'OwnTokenizer'"):
        prompt_of(tiny.plan(tmp_path))


@pytest.mark.parametrize("family", ["internvl", "internvl_chat"])
def test_internvl_numbers_the_frames_of_a_clip(family: str, tmp_path: Path) -> None:
    """And several images of a tile each stay several images."""
    getattr(tiny, family)(tmp_path / "model")
    clip, pictures = (tiny.plan(tmp_path / "model", (), Request(3, size)).geometry for size in (None, ONE))
    processor: Any = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>", image_seq_length=TOKENS
    )
    wanted = InternVLProcessor.replace_video_token(processor, {"pixel_values_videos": [np.zeros((3, 1))]}, 0)
    assert (clip.media, clip.mark, clip.placeholders) == ("video", "<video>", 3)
    assert clip.written.replace("<IMG_CONTEXT>", "<IMG_CONTEXT>" * TOKENS) == wanted
    assert (pictures.media, pictures.mark, pictures.written) == (
        "image",
        "<IMG_CONTEXT>",
        of_internvl(1, 1).replace("<IMG_CONTEXT>" * TOKENS, "<IMG_CONTEXT>"),
    )


@pytest.mark.parametrize(("frames", "said"), [(3, "three"), (16, "sixteen"), (20, "twenty"), (64, "sixty-four")])
def test_smolvlm_tells_the_times_of_a_clip(frames: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame a second, and what the processor's template for clips writes around."""
    monkeypatch.setattr(processing_smolvlm, "num2words", {frames: said}.__getitem__)
    processor: Any = SimpleNamespace(
        fake_image_token="<fake_token_around_image>", image_token="<image>", image_seq_len=TOKENS,
        global_image_token="<global-img>",
    )  # fmt: skip
    metadata = SimpleNamespace(fps=1, timestamps=list(range(frames)), duration=frames)
    given = {"pixel_values": np.zeros((1, frames)), "video_metadata": [metadata]}
    wanted = SmolVLMProcessor.replace_video_token(processor, given, 0)
    template = Template(processing_smolvlm.DEFAULT_CHAT_TEMPLATE, trim_blocks=True, lstrip_blocks=True)
    shown, asked = (
        template.render(
            messages=[{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "What happens?"}]}],
            add_generation_prompt=True,
        )
        for kind in ("video", "image")
    )
    found = asked.replace("<image>", smolvlm.timed(frames))
    assert found.replace("<image>", "<image>" * TOKENS) == shown.replace("<video>", wanted)


def test_smolvlm_sees_a_clip_or_several_images(tmp_path: Path) -> None:
    tiny.smolvlm(tmp_path)
    clip, pictures = (tiny.plan(tmp_path, (), Request(3, size)).geometry for size in (None, ONE))
    assert (clip.mark, clip.written, clip.placeholders) == ("<image>", smolvlm.timed(3), 3)
    assert (pictures.written.count("<image>"), pictures.placeholders) == (1, 3)
    with pytest.raises(UsageError, match="A clip of 100 frames"):
        smolvlm.timed(100)


def test_times_of_a_clip(tmp_path: Path) -> None:
    """Qwen3-VL's steps of a clip of six frames, sampled twice a second; the processor writes them for the template's clip."""
    tiny.qwen3_vl(tmp_path)
    g = tiny.plan(tmp_path, (), Request(6, (112, 84))).geometry
    processor: Any = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2), video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
        _calculate_timestamps=partial(Qwen3VLProcessor._calculate_timestamps, None),
    )  # fmt: skip
    metadata = SimpleNamespace(fps=2, frames_indices=list(range(6)))
    found = {"video_grid_thw": np.array([[3, 8, 6]]), "video_metadata": [metadata]}
    wanted = Qwen3VLProcessor.replace_video_token(processor, found, 0)
    assert (g.placeholders, g.media) == (3, "video")
    assert g.mark == "<|vision_start|><|video_pad|><|vision_end|>"
    assert g.written.replace("<|video_pad|>", "<|video_pad|>" * 12) == wanted
