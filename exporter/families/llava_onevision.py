"""LLaVA-OneVision: SigLIP tower on the whole image and on tiles, MLP projector, row ends, Qwen2 decoder.

`--image-size` names the grid, one of the checkpoint's `image_grid_pinpoints`; without it, and with several images, each is a
single picture with one row end. A clip is several images: the pooled tokens of the video mode are not here.
"""

from __future__ import annotations

from typing import Any, ClassVar

from exporter.families._anyres import AnyRes, most_tiles


class LlavaOnevision(AnyRes):
    model_type = "llava_onevision"
    summary = "LLaVA-OneVision: SigLIP tower, static grid of tiles, row ends, MLP projector, Qwen2 decoder"
    feature_layer, select = -1, "full"
    image_token = 151646
    normal = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    published: ClassVar = {
        "_name_or_path": "llava-hf/llava-onevision-qwen2-7b-ov-hf", "model_type": "llava_onevision",
        "image_token_index": 151646, "video_token_index": 151647, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
            "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
        },
        "text_config": {
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152128, "rope_theta": 1000000.0,
        },
    }  # fmt: skip

    def check(self, config: dict[str, Any], tiles: tuple[int, int]) -> None:
        most_tiles(str(config.get("vision_aspect_ratio", "anyres_max_9")), tiles)


FAMILY = LlavaOnevision()
