"""InternVL as OpenGVLab publishes it (InternVL2.5, 3 and 3.5 with Qwen2, Qwen3 or Llama): `internvl` under other names.

Queries, keys and values of the tower are one tensor. Prompts follow the chat template in the checkpoint's tokenizer, which lacks
the system message that the published Python code puts in front.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.families._contract import Geometry, Request, renamed
from exporter.families.internvl import IMAGE, TOWER, InternVl
from exporter.nn.specs import DecoderSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn


RENAMES = (
    (r"^vision_model\.", "vision."),
    (r"^mlp1\.0\.", "projector.layer_norm."),
    (r"^mlp1\.1\.", "projector.linear_1."),
    (r"^mlp1\.3\.", "projector.linear_2."),
    (r"^vision\.embeddings\.position_embedding$", "vision.embeddings.position_embedding.weight"),
    (r"^(vision\.encoder\.layers\.\d+)\.attn\.qkv\.", r"\1.self_attn.{q,k,v}_proj."),
    (r"^(vision\.encoder\.layers\.\d+)\.attn\.proj\.", r"\1.self_attn.out_proj."),
    (r"^(vision\.encoder\.layers\.\d+)\.attn\.", r"\1.self_attn."),
    (r"^(vision\.encoder\.layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"^(vision\.encoder\.layers\.\d+)\.ls(\d)$", r"\1.lambda_\2"),
)

TOWER_NAMES = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}
"""What `internvl` calls otherwise."""

DEFAULTS = {
    "hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 48, "num_attention_heads": 25, "image_size": 224,
    "qk_normalization": True, "qkv_bias": False, "norm_type": "rms_norm",
}  # fmt: skip
"""What the published code takes a key of vision_config for that config.json does not have."""


class InternVlChat(InternVl):
    model_type = "internvl_chat"
    summary = "InternVL2.5 to 3.5 as published: InternViT, pixel shuffle, MLP, Qwen2, Qwen3 or Llama decoder"
    published: ClassVar = {
        "_name_or_path": "OpenGVLab/InternVL3-8B", "model_type": "internvl_chat", "downsample_ratio": 0.5, "select_layer": -1,
        "force_image_size": 448, "ps_version": "v2",
        "vision_config": {
            "model_type": "intern_vit_6b", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 448, "patch_size": 14, "qkv_bias": True, "qk_normalization": False,
            "norm_type": "layer_norm",
        },
        "llm_config": InternVl.published["text_config"],
    }  # fmt: skip

    def canonical(self, key: str) -> str:
        return super().canonical(renamed(key, RENAMES))

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        return super().geometry(_as_internvl(checkpoint), request)

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        return super().vision(_as_internvl(checkpoint), geometry, taps, in_tower)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> nn.Module:
        return super().projector(_as_internvl(checkpoint), geometry)

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        return super().decoder(_as_internvl(checkpoint))


def _as_internvl(checkpoint: Checkpoint) -> Checkpoint:
    """The same with the config that transformers would have."""
    config = checkpoint.config
    if "llm_config" not in config:
        return checkpoint  # is one already
    if config.get("ps_version", "v1") != "v2":
        raise CheckpointError("ps_version: 'v1', which transposes tiles, is not supported, only 'v2'.")
    tower = TOWER | DEFAULTS | (config.get("vision_config") or {})
    size = config.get("force_image_size") or tower["image_size"]
    if size != tower["image_size"]:
        raise CheckpointError(
            f"force_image_size {size} with positions for {tower['image_size']} is not supported: they would be stretched."
        )
    return checkpoint.with_config({
        "model_type": config["model_type"],
        "text_config": config["llm_config"],
        "vision_config": {TOWER_NAMES.get(name, name): value for name, value in tower.items()},
        "vision_feature_layer": config.get("select_layer", -1),
        "downsample_ratio": config.get("downsample_ratio", 0.5),
        "image_token_id": _image_token(checkpoint),
    })  # fmt: skip


def _image_token(checkpoint: Checkpoint) -> int:
    """From the tokenizer's files, as config.json does not say; else that of the Qwen2 tokenizer."""
    tokens: dict[str, Any] = checkpoint.optional_json("tokenizer_config.json").get("added_tokens_decoder") or {}
    return next((int(token) for token, said in tokens.items() if said.get("content") == IMAGE), 151667)


FAMILY = InternVlChat()
