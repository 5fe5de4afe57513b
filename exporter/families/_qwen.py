"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: a tower without class token on one static grid, a 2×2 merger, M-RoPE.

One placeholder (`<|image_pad|>` or `<|video_pad|>`, expanded) per image or clip; positions are t/h/w triplets.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError, UsageError
from exporter.families._contract import (
    PROMPT,
    Family,
    Geometry,
    Request,
    check_multiple,
    decoder_spec,
    eos_tokens,
    image_spec,
    renamed,
    rope,
    text_config,
)
from exporter.graphset import ImageSpec
from exporter.nn.specs import DecoderSpec, QwenVitSpec
from graphs._contract import InTower, Site

if TYPE_CHECKING:
    from torch import nn


RENAMES = (
    (r"^(?:model\.)?visual\.", "vision."),
    (r"^lm_head\.", "head."),
    (r"^model\.(?:language_model\.)?", "text."),
)

FRAMES_PER_SECOND = 2.0
"""Sampling rate that the video processors assume when none is given; it fixes what stands for the time of a frame."""

OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation that CLIP's images have."""


class Qwen(Family):
    side: int
    """Pixels of an image's edges when none are asked for: 256 visual tokens."""
    normal: tuple[Sequence[float], Sequence[float]] = OPENAI

    def canonical(self, key: str) -> str:
        return renamed(key, RENAMES)

    @abstractmethod
    def tower(self, config: dict[str, Any], size: tuple[int, int]) -> QwenVitSpec:
        """Of images of this height and width."""

    def stride(self, vision: dict[str, Any]) -> int:
        """How far the positions of one time step of a clip are from those of the next."""
        return 1

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        config = checkpoint.config
        size = request.image_size or (self.side, self.side)
        spec = self.tower(config, size)
        if request.frames > 1 and request.frames % spec.temporal_patch:
            raise UsageError(
                f"--frames {request.frames}: this tower merges {spec.temporal_patch} frames into one; pass a multiple."
            )
        steps = max(1, request.frames // spec.temporal_patch)
        rows, cols = spec.grid
        stride = self.stride(config["vision_config"])
        ids = tuple((t * stride, r, c) for t in range(steps) for r in range(rows) for c in range(cols))
        decoder = self.decoder(checkpoint)
        site = Site(
            rows * cols, steps, spec.grid, spec.signals | PROMPT, spec.blocks,
            grid_positions=True, dim=spec.out, patch_dim=0 if spec.planes else spec.hidden, llm_dim=decoder.hidden,
        )  # fmt: skip
        token = config.get("image_token_id" if request.frames == 1 else "video_token_id")
        if token is None:
            token = 151655 if request.frames == 1 else 151656
        return Geometry(
            image=self.image(checkpoint, size),
            frames=request.frames,
            placeholders=1,
            grid=spec.grid,
            tower=site,
            in_tower="its 2×2 merger needs the complete grid, so the tower cannot be shortened",
            ids=ids,
            span=max(max(i) for i in ids) + 1,
            position_axes=3,
            hidden=decoder.hidden,
            layers=decoder.layers,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            vocab=decoder.vocab,
            image_token=int(token),
            eos=eos_tokens(checkpoint),
            media="image" if request.frames == 1 else "video",
            planes=decoder.planes,
        )

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        from exporter.nn.qwen_vit import QwenVit

        assert in_tower is None
        spec = self.tower(checkpoint.config, (geometry.image.height, geometry.image.width))
        return QwenVit(spec, taps, geometry.tower.frames)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> None:
        return None

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        section = rope(text_config(checkpoint.config)).get("mrope_section")
        if not section:
            raise CheckpointError(
                f"config.json gives no mrope_section; this is not a {self.model_type} language model."
            )
        return decoder_spec(checkpoint.config, tuple(int(s) for s in section))

    def image(self, checkpoint: Checkpoint, size: tuple[int, int]) -> ImageSpec:
        height, width = size
        return image_spec(
            checkpoint,
            *self.normal,
            height=height,
            width=width,
            resize="exact",
            resize_height=height,
            resize_width=width,
        )


def patch_grid(size: tuple[int, int], patch: int, merge: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises UsageError where they do not fit."""
    check_multiple(size, patch * merge)
    return size[0] // patch, size[1] // patch
