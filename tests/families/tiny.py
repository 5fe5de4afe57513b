"""Tiny random checkpoints, saved to disk by Hugging Face's own classes and read back through the real loading code."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

TOWERS = ("clip_vision_model", "siglip_vision_model")
DECODERS = ("llama", "mistral", "qwen2")
IMAGE_TOKEN = 5


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that every part matters: norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0))
    return model.eval()


def llava(folder: Path, tower: str = "clip_vision_model", decoder: str = "llama", layers: int = 4) -> PreTrainedModel:
    text = dict(
        model_type=decoder, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, max_position_embeddings=512, rms_norm_eps=1e-5, eos_token_id=2,
    )  # fmt: skip
    if decoder == "mistral":
        text["sliding_window"] = 24
    vision = dict(
        model_type=tower, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        image_size=56, patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=16,
        vision_feature_layer=-2, vision_feature_select_strategy="default" if tower.startswith("clip") else "full",
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomize(LlavaForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model


def qwen2_5_vl(folder: Path, layers: int = 4) -> PreTrainedModel:
    text = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=512, eos_token_id=2,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3]),
    )  # fmt: skip
    vision = dict(
        depth=4, hidden_size=48, intermediate_size=96, num_heads=4, patch_size=14, spatial_merge_size=2,
        temporal_patch_size=2, window_size=56, fullatt_block_indexes=[1, 3], out_hidden_size=64, tokens_per_second=2,
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, video_token_id=6, vision_start_token_id=7,
        vision_end_token_id=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomize(Qwen2_5_VLForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model
