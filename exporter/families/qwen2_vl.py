"""Qwen2-VL: tower with full attention and without CLS, 2×2 merger, M-RoPE; exported for one static grid.

One placeholder (`<|image_pad|>` or `<|video_pad|>`, expanded) per image or clip; positions are t/h/w triplets, of which t counts
the time steps.
"""

from __future__ import annotations

from typing import Any, ClassVar

from exporter.families._qwen import Qwen, patch_grid
from exporter.nn.specs import QwenVitSpec


class Qwen2VL(Qwen):
    model_type = "qwen2_vl"
    summary = "Qwen2-VL: full attention, 2×2 merger, M-RoPE, static grid"
    side = 448
    published: ClassVar = {
        "_name_or_path": "Qwen/Qwen2-VL-7B-Instruct", "model_type": "qwen2_vl",
        "image_token_id": 151655, "video_token_id": 151656,
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "hidden_size": 3584,
        },
        "text_config": {
            "model_type": "qwen2_vl_text", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
    }  # fmt: skip

    def tower(self, config: dict[str, Any], size: tuple[int, int]) -> QwenVitSpec:
        vision = config["vision_config"]
        patch, merge = int(vision.get("patch_size", 14)), int(vision.get("spatial_merge_size", 2))
        hidden, blocks = int(vision.get("embed_dim", 1280)), int(vision.get("depth", 32))
        return QwenVitSpec(
            hidden=hidden,
            intermediate=int(hidden * vision.get("mlp_ratio", 4)),
            blocks=blocks,
            heads=int(vision.get("num_heads", 16)),
            patch=patch,
            temporal_patch=int(vision.get("temporal_patch_size", 2)),
            merge=merge,
            window=0,
            full=tuple(range(blocks)),
            out=int(vision["hidden_size"]),
            activation=str(vision.get("hidden_act", "quick_gelu")),
            patches=patch_grid(size, patch, merge),
            gated=False,
            layer_norm=True,
        )


FAMILY = Qwen2VL()
