"""LLaVA-1.5 in the layout of LLaVA's own code, in which most trained projectors are published (TokenPacker, MQT, M3, LLaVA-STF).

A checkpoint whose projector shortens says so in its code, not in its config: it is known by its tensors. `--reduce` sets its knobs
(`mqt:keep=36`). What config.json calls `llava` is read so, too, where it has this layout. Tiles (LLaVA-NeXT) are `llava_next`'s.
"""

from __future__ import annotations

from typing import ClassVar

from exporter.families._original import Original


class LlavaLlama(Original):
    model_type = "llava_llama"
    summary = "LLaVA-1.5 in the layout of LLaVA's own code: CLIP tower, MLP or trained projector that shortens, Llama"
    published: ClassVar = {
        "_name_or_path": "mucai/llava-v1.5-7b-m3", "model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "image_aspect_ratio": "pad",
    }  # fmt: skip
    compressors: ClassVar = {
        "model.mm_projector.q_proj_1.weight": "tokenpacker", "model.mm_projector.pos_embed": "mqt",
        "model.mm_projector.downsampler.to_q.weight": "hires", "model.mm_projector_crosslayer.0.weight": "llava_stf",
    }  # fmt: skip


FAMILY = LlavaLlama()
