"""LLaVA-NeXT (LLaVA-1.6): CLIP tower on the whole image and on tiles, MLP projector, row ends, Mistral, Llama or Qwen2 decoder.

`--image-size` names the grid, one of the checkpoint's `image_grid_pinpoints`; without it an image is a single picture.
"""

from __future__ import annotations

from typing import ClassVar

from exporter.families._anyres import AnyRes


class LlavaNext(AnyRes):
    model_type = "llava_next"
    summary = "LLaVA-NeXT: CLIP tower, static grid of tiles, row ends, MLP projector, Mistral, Llama or Qwen2 decoder"
    image_token = 32000
    normal = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    published: ClassVar = {
        "_name_or_path": "llava-hf/llava-v1.6-mistral-7b-hf", "model_type": "llava_next", "image_token_index": 32000,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
        "text_config": {
            "model_type": "mistral", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
            "sliding_window": None, "vocab_size": 32064,
        },
    }  # fmt: skip


FAMILY = LlavaNext()
