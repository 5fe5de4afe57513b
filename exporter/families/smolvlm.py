"""SmolVLM and SmolVLM2: SigLIP tower, pixel shuffle, SmolLM2 (Llama) decoder; one tile, or a grid of tiles with the whole image.

A clip is several images, as in a prompt with several of them; the times that the video processor writes between frames are left
to the prompt.
"""

from __future__ import annotations

from typing import ClassVar

from exporter.families._idefics import Idefics


class SmolVlm(Idefics):
    model_type = "smolvlm"
    summary = "SmolVLM and SmolVLM2: SigLIP tower, pixel shuffle, Llama decoder; one tile or a static grid of tiles"
    published: ClassVar = {
        "_name_or_path": "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "model_type": "smolvlm", "image_token_id": 49190,
        "scale_factor": 3,
        "vision_config": {
            "model_type": "smolvlm_vision", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
        },
        "text_config": {
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64, "vocab_size": 49280,
            "rms_norm_eps": 1e-5, "rope_theta": 130000.0, "max_position_embeddings": 8192,
        },
    }  # fmt: skip


FAMILY = SmolVlm()
