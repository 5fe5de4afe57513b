from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from exporter.errors import UsageError
from exporter.graphset import ImageSpec
from exporter.runtime.images import clip, load, preprocess, sample

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(30, 40), (41, 29), (24, 24), (7, 90), (3, 5)]


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(noise[:, :, 0] if mode == "L" else noise)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("processor", [CLIPImageProcessorPil, LlavaImageProcessorPil])
@pytest.mark.parametrize("crop", [24, 31])
def test_shortest_edge_and_centre_crop(processor: Any, size: tuple[int, int], crop: int) -> None:
    """Also where the crop is larger than the image."""
    image, square = picture(*size), {"height": crop, "width": crop}
    wanted = processor(size={"shortest_edge": 24}, crop_size=square)(image, return_tensors="np")
    spec = ImageSpec(crop, crop, "shortest_edge", 24, 24, 3, MEAN, STD)
    assert np.array_equal(preprocess([image], spec)[0], wanted["pixel_values"])


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_exact_size(resample: int, mode: str) -> None:
    image, size = picture(40, 30, mode=mode), {"height": 20, "width": 28}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    hf = CLIPImageProcessorPil(size=size, do_center_crop=False, resample=resample, **half)
    spec = ImageSpec(20, 28, "exact", 20, 28, resample, (0.5,) * 3, (0.5,) * 3)
    assert np.array_equal(preprocess([image], spec)[0], hf(image, return_tensors="np")["pixel_values"])


def test_qwen_at_a_fixed_size() -> None:
    """Its processor returns patches in merge order, each frame twice; put back together they are our pixels."""
    image = picture(70, 90)
    found = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 84, "longest_edge": 56 * 84})(
        image, return_tensors="np"
    )
    _, rows, columns = found["image_grid_thw"][0]
    patches = found["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)
    assert np.array_equal(patches[:, :, :, :, :, 0], patches[:, :, :, :, :, 1])
    wanted = patches[:, :, :, :, :, 0].transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * 14, columns * 14)
    spec = ImageSpec(rows * 14, columns * 14, "exact", rows * 14, columns * 14, 3, MEAN, STD)
    assert np.array_equal(preprocess([image], spec)[0, 0], wanted)


def test_frames_are_stacked_in_order() -> None:
    frames = [picture(9, 9, seed) for seed in range(3)]
    spec = ImageSpec(8, 8, "exact", 8, 8, 3, MEAN, STD)
    found = preprocess(frames, spec)
    assert found.shape == (1, 3, 3, 8, 8)
    assert found.dtype == np.float32
    assert all(np.array_equal(found[0, i], preprocess([frame], spec)[0, 0]) for i, frame in enumerate(frames))


def test_load_turns_a_photograph_upright(tmp_path: Path) -> None:
    image, exif = picture(12, 8), Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(load(tmp_path / "turned.png")), np.rot90(np.asarray(image), -1))
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert load(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_clips(tmp_path: Path) -> None:
    greys = [Image.new("RGB", (4, 4), (30 * i,) * 3) for i in range(8)]
    greys[0].save(tmp_path / "clip.gif", save_all=True, append_images=greys[1:], duration=50)
    (tmp_path / "frames").mkdir()
    for i in range(11):  # frame_10 comes last, not second
        Image.new("RGB", (4, 4), (20 * i,) * 3).save(tmp_path / "frames" / f"frame_{i}.png")
    (tmp_path / "frames" / "notes.txt").write_text("no frame")

    def brightness(frames: Sequence[Image.Image]) -> list[int]:
        return [frame.getpixel((0, 0))[0] for frame in frames]  # type: ignore[index]

    assert brightness(clip(tmp_path / "clip.gif", 3)) == [0, 120, 210]
    assert brightness(clip(tmp_path / "clip.gif", 8)) == [30 * i for i in range(8)]
    assert brightness(clip(tmp_path / "frames", 3)) == [0, 100, 200]
    assert brightness(clip([tmp_path / "frames" / "frame_7.png"], 2)) == [140, 140]
    assert brightness(clip(tmp_path / "frames" / "frame_7.png", 2)) == [140, 140]


def test_sample() -> None:
    assert [sample(n, 4) for n in (1, 2, 4, 5, 100)] == [
        [0] * 4, [0, 0, 1, 1], [0, 1, 2, 3], [0, 1, 3, 4], [0, 33, 66, 99],
    ]  # fmt: skip
    assert [sample(n, 1) for n in (1, 2, 5)] == [[0], [0], [2]]


def test_what_is_no_image_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no image .*x\.png"):
        load(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(b"text")
    with pytest.raises(UsageError, match="no image that Pillow reads"):
        load(tmp_path / "x.png")
    picture(50, 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(UsageError, match="complete"):
        load(tmp_path / "half.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="No frames"):
        clip(tmp_path / "empty", 2)
