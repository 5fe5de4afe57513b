"""What Hugging Face's model of a family gets for a question that our runtime is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from exporter.graphset import GraphSet
from tests.families.tiny import IMAGE, PATCH, Pixels, Question

INSTRUCTION_NAMES = {"instruction_ids": "input_ids", "instruction_mask": "attention_mask"}


def of_frames(pixels: Pixels, ids: torch.Tensor, graphs: GraphSet) -> dict[str, Any]:
    """[frames, 3, height, width], or a clip [1, frames, 3, height, width]"""
    if graphs.visual.media == "video":
        return {"pixel_values_videos": torch.from_numpy(pixels)}
    return {"pixel_values": torch.from_numpy(pixels[0])}


def of_tower(pixels: Pixels, ids: torch.Tensor, graphs: GraphSet) -> dict[str, Any]:
    """[frames, 3, height, width], clips too"""
    return {"pixel_values": torch.from_numpy(pixels[0])}


def of_samples(pixels: Pixels, ids: torch.Tensor, graphs: GraphSet) -> dict[str, Any]:
    """[samples, frames, 3, height, width]"""
    return {"pixel_values": torch.from_numpy(pixels)}


def of_tiles(pixels: Pixels, ids: torch.Tensor, graphs: GraphSet) -> dict[str, Any]:
    """[images, tiles, 3, height, width], and how large the images were; or a clip."""
    if graphs.visual.media == "video":
        return of_frames(pixels, ids, graphs)
    parts, (rows, cols) = graphs.image.parts, graphs.image.tiles
    size = torch.tensor([[rows * graphs.image.height, cols * graphs.image.width]] * graphs.images)
    found = {"pixel_values": torch.from_numpy(pixels[0]).unflatten(0, (-1, parts)), "image_sizes": size}
    return found | ({"batch_num_images": torch.tensor([graphs.images])} if parts == 1 else {})


def of_patches(pixels: Pixels, ids: torch.Tensor, graphs: GraphSet) -> dict[str, Any]:
    """[patches, numbers of a patch], the grid of every image or clip, and which tokens are visual."""
    visual, token = graphs.visual, graphs.text.image_token
    kind = "image" if token == IMAGE else "video"
    grid = torch.tensor([[max(1, visual.frames // 2), *(s // PATCH for s in pixels.shape[-2:])]])
    return {
        f"{kind}_grid_thw": grid, "mm_token_type_ids": (ids == token).long() * (1 + (kind == "video")),
        "pixel_values" if kind == "image" else "pixel_values_videos": patches(pixels[0]),
    }  # fmt: skip


def of_sizes(pixels: Pixels, ids: torch.Tensor, graphs: GraphSet) -> dict[str, Any]:
    """Frames, and how large they are."""
    found = of_frames(pixels, ids, graphs)
    return found | {"image_sizes": torch.tensor([found["pixel_values"].shape[-2:]] * graphs.images)}


def of_gemma(pixels: Pixels, ids: torch.Tensor, graphs: GraphSet) -> dict[str, Any]:
    """Frames, and which tokens see each other."""
    kind = ids == graphs.text.image_token if graphs.family == "gemma3" else torch.zeros_like(ids)
    return of_frames(pixels, ids, graphs) | {"token_type_ids": kind.long()}


VISUAL: dict[str, Callable[[Pixels, torch.Tensor, GraphSet], dict[str, Any]]] = {
    "gemma3": of_gemma,
    "idefics3": of_samples,
    "internvl": of_tower,
    "internvl_chat": of_tower,
    "llava_next": of_tiles,
    "llava_next_video": of_tiles,
    "llava_onevision": of_tiles,
    "mistral3": of_sizes,
    "paligemma": of_gemma,
    "qwen2_5_vl": of_patches,
    "qwen2_vl": of_patches,
    "qwen3_vl": of_patches,
    "smolvlm": of_samples,
}
"""Family → what its Hugging Face model gets beside the text, if not just frames."""


def arguments(asked: Question, graphs: GraphSet) -> dict[str, Any]:
    """Every image token expanded, and pixels as the family takes them."""
    visual, token = graphs.visual, graphs.text.image_token
    each = visual.total // visual.placeholders
    ids = torch.tensor([[t for p in asked.prompt for t in ([p] * each if p == token else [p])]])
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, value in asked.side.items():
        if name.startswith("instruction_"):
            found[f"qformer_{INSTRUCTION_NAMES[name]}"] = torch.from_numpy(value)
    return found | VISUAL.get(graphs.family, of_frames)(asked.pixels, ids, graphs)


def patches(frames: npt.NDArray[np.float32]) -> torch.Tensor:
    """[frames, 3, height, width] → [patches, 3 * 2 * 14 * 14], as Qwen's processors order them."""
    x = torch.from_numpy(frames.repeat(2, 0) if len(frames) == 1 else frames)
    rows, cols = (s // (2 * PATCH) for s in x.shape[-2:])
    x = x.reshape(-1, 2, 3, rows, 2, PATCH, cols, 2, PATCH).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(-1, 3 * 2 * PATCH * PATCH)
