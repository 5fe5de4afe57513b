"""MobileVLM and MobileVLM V2 as published: CLIP tower, a projector that leaves a quarter of the tokens (LDP, LDPv2), Llama decoder.

The first version's checkpoints do not hold their tower; `--clip-model` brings it.
"""

from __future__ import annotations

from typing import ClassVar

from exporter.families._original import Original


class MobileVlm(Original):
    model_type = "mobilevlm"
    summary = (
        "MobileVLM and MobileVLM V2 as published: CLIP tower, LDP or LDPv2 projector (a quarter of the tokens), Llama"
    )
    published: ClassVar = {
        "_name_or_path": "mtgv/MobileVLM_V2-1.7B", "model_type": "mobilevlm", "mm_projector_type": "ldpnetv2",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2, "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 32000,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "image_aspect_ratio": "pad",
    }  # fmt: skip
    compressors: ClassVar = {"ldpnet": "ldp", "ldpnetv2": "ldpv2"}


FAMILY = MobileVlm()
