"""What a model sees and reads is what its own processor makes of an image and of the chat template's image token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from exporter.families._contract import Geometry, Request
from exporter.runtime import images
from tests.families import tiny

SIDE = 56
TOKENS = 4
"""Visual tokens of a tile."""
ONE, GRID = (SIDE, SIDE), (2 * SIDE, 3 * SIDE)
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
    token: str
    text: Callable[[int, int], str]
    tiles: tuple[int, int] = (1, 1)


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
            "internvl", size, picture,
            GotOcr2ImageProcessorPil(
                size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=tiles[0] * tiles[1],
                min_patches=tiles[0] * tiles[1], image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
            ),
            "<IMG_CONTEXT>", of_internvl, tiles,
        )
        for size, picture, tiles in ((None, (61, 47), (1, 1)), (GRID, (96, 65), (2, 3)))
    ),
]  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda case: f"{case.family}-{case.tiles[0]}x{case.tiles[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def geometry(case: Case, folder: Path, frames: int = 1) -> Geometry:
    getattr(tiny, case.family)(folder)
    case.processor.save_pretrained(folder)
    return tiny.plan(folder, (), Request(frames, case.size)).geometry


def test_pixels(case: Case, tmp_path: Path) -> None:
    """Of two pictures, one after another."""
    rng = np.random.default_rng(0)
    shape = (*case.picture[::-1], 3)
    pictures = [Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for _ in range(2)]
    wanted = case.processor([pictures], return_tensors="np")["pixel_values"]
    g = geometry(case, tmp_path, frames=2)
    found = images.preprocess(pictures, g.image)
    assert found.shape == (1, g.frames, 3, g.image.height, g.image.width)
    assert np.array_equal(found[0], np.asarray(wanted).reshape(found.shape[1:]))


def test_text(case: Case, tmp_path: Path) -> None:
    """An image token stands for all tokens of a tile."""
    g = geometry(case, tmp_path)
    assert g.written.count(case.token) == g.placeholders == g.image.parts
    assert g.written.replace(case.token, case.token * TOKENS) == case.text(*case.tiles)
    assert g.mark == case.token


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
