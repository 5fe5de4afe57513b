"""Qwen2.5-VL: window-attention tower without CLS, 2×2 merger, M-RoPE; exported for one static grid.

One placeholder (`<|image_pad|>` or `<|video_pad|>`, expanded) per image or clip; positions are t/h/w triplets.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

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
    normalization,
    rope,
    text_config,
)  # fmt: skip
from exporter.graphset import ImageSpec
from exporter.nn.specs import DecoderSpec, QwenVitSpec
from graphs._contract import InTower, Site

if TYPE_CHECKING:
    from torch import nn


DEFAULT_SIZE = (448, 448)
"""Image size when none is asked for: 256 visual tokens with 14-pixel patches and the 2×2 merger."""

FRAMES_PER_SECOND = 2.0
"""Sampling rate that the video processor assumes when none is given; it fixes the temporal position stride."""


class Qwen25VL(Family):
    model_type = "qwen2_5_vl"
    summary = "Qwen2.5-VL: window attention, 2×2 merger, M-RoPE, static grid"
    published: ClassVar = {
        "_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct", "model_type": "qwen2_5_vl",
        "image_token_id": 151655, "video_token_id": 151656,
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": 3584, "tokens_per_second": 2,
        },
        "text_config": {
            "model_type": "qwen2_5_vl_text", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
    }  # fmt: skip

    def canonical(self, key: str) -> str:
        for pattern, name in (
            (r"^(?:model\.)?visual\.", "vision."),
            (r"^lm_head\.", "head."),
            (r"^model\.(?:language_model\.)?", "text."),
        ):
            if re.match(pattern, key):
                return re.sub(pattern, name, key)
        return key

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        config = checkpoint.config
        size = request.image_size or DEFAULT_SIZE
        spec = self._tower(config, size)
        vision = config["vision_config"]
        if request.frames > 1 and request.frames % spec.temporal_patch:
            raise UsageError(
                f"--frames {request.frames}: this tower merges {spec.temporal_patch} frames into one; pass a multiple."
            )
        steps = max(1, request.frames // spec.temporal_patch)
        rows, cols = spec.grid
        stride = 0
        if request.frames > 1:
            stride = int(int(vision.get("tokens_per_second", 4)) * spec.temporal_patch / FRAMES_PER_SECOND)
        ids = tuple((t * stride, r, c) for t in range(steps) for r in range(rows) for c in range(cols))
        decoder = self.decoder(checkpoint)
        site = Site(
            rows * cols, steps, spec.grid, spec.signals | PROMPT, spec.blocks,
            grid_positions=True, dim=spec.out, llm_dim=decoder.hidden,
        )  # fmt: skip
        token = config.get("image_token_id" if request.frames == 1 else "video_token_id")
        if token is None:
            token = 151655 if request.frames == 1 else 151656
        return Geometry(
            image=self._image(checkpoint, size),
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
        )

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        from exporter.nn.qwen_vit import QwenVit

        assert in_tower is None
        spec = self._tower(checkpoint.config, (geometry.image.height, geometry.image.width))
        return QwenVit(spec, taps, geometry.tower.frames)

    def projector(self, checkpoint: Checkpoint) -> None:
        return None

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        section = rope(text_config(checkpoint.config)).get("mrope_section")
        if not section:
            raise CheckpointError("config.json gives no mrope_section; this is not a Qwen2.5-VL language model.")
        return decoder_spec(checkpoint.config, tuple(int(s) for s in section))

    def _tower(self, config: dict[str, Any], size: tuple[int, int]) -> QwenVitSpec:
        vision = config["vision_config"]
        patch, merge = int(vision.get("patch_size", 14)), int(vision.get("spatial_merge_size", 2))
        check_multiple(size, patch * merge)
        return QwenVitSpec(
            hidden=int(vision["hidden_size"]),
            intermediate=int(vision["intermediate_size"]),
            blocks=int(vision["depth"]),
            heads=int(vision["num_heads"]),
            patch=patch,
            temporal_patch=int(vision.get("temporal_patch_size", 2)),
            merge=merge,
            window=int(vision.get("window_size", 112)),
            full=tuple(int(b) for b in vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
            out=int(vision["out_hidden_size"]),
            activation=str(vision.get("hidden_act", "silu")),
            patches=(size[0] // patch, size[1] // patch),
        )

    def _image(self, checkpoint: Checkpoint, size: tuple[int, int]) -> ImageSpec:
        found = normalization(checkpoint)
        return ImageSpec(
            height=size[0],
            width=size[1],
            resize="exact",
            resize_height=size[0],
            resize_width=size[1],
            resample=int(found.get("resample", 3)),
            mean=tuple(found.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
            std=tuple(found.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        )


FAMILY = Qwen25VL()
