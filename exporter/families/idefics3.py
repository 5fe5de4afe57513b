"""Idefics3, and the first SmolVLM models, which call themselves so: SigLIP tower, pixel shuffle, Llama decoder; one tile, or a
grid of tiles with the whole image."""

from __future__ import annotations

from typing import ClassVar

from exporter.families._idefics import Idefics


class Idefics3(Idefics):
    model_type = "idefics3"
    summary = (
        "Idefics3 and SmolVLM (first): SigLIP tower, pixel shuffle, Llama decoder; one tile or a static grid of tiles"
    )
    published: ClassVar = {
        "_name_or_path": "HuggingFaceTB/SmolVLM-256M-Instruct", "model_type": "idefics3", "image_token_id": 49190,
        "scale_factor": 4,
        "vision_config": {
            "model_type": "idefics3", "hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
        },
        "text_config": {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280,
            "rms_norm_eps": 1e-5, "rope_theta": 100000, "max_position_embeddings": 8192,
        },
    }  # fmt: skip


FAMILY = Idefics3()
