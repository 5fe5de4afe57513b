"""Qwen2.5-VL: window-attention tower without CLS, 2×2 merger, M-RoPE; exported for one static grid.

One placeholder (`<|image_pad|>` or `<|video_pad|>`, expanded) per image or clip; positions are t/h/w triplets.
"""

from __future__ import annotations

from typing import Any, ClassVar

from exporter.families._qwen import FRAMES_PER_SECOND, Qwen, patch_grid
from exporter.nn.specs import QwenVitSpec


class Qwen25VL(Qwen):
    model_type = "qwen2_5_vl"
    summary = "Qwen2.5-VL: window attention, 2×2 merger, M-RoPE, static grid"
    side = 448
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

    def stride(self, vision: dict[str, Any]) -> int:
        per_second, merged = int(vision.get("tokens_per_second", 4)), int(vision.get("temporal_patch_size", 2))
        return int(per_second * merged / FRAMES_PER_SECOND)

    def tower(self, config: dict[str, Any], size: tuple[int, int]) -> QwenVitSpec:
        vision = config["vision_config"]
        patch, merge = int(vision.get("patch_size", 14)), int(vision.get("spatial_merge_size", 2))
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
            patches=patch_grid(size, patch, merge),
        )


FAMILY = Qwen25VL()
