"""InternVL3 and others in transformers' layout: InternViT (class token, layer scale), pixel shuffle, MLP, Qwen2, Qwen3 or Llama
decoder. An image is one tile, or a grid of tiles and the whole image behind them (`--image-size`).

A clip (`--frames` above 1) is so many tiles, each behind its number in text. With the `--image-size` of a single tile it is so many
images instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.families import _shuffled
from exporter.families._contract import (
    Family,
    Geometry,
    Request,
    decoder_spec,
    image_spec,
    renamed,
    tile_grid,
)
from exporter.families._towers import feature_blocks
from exporter.nn.specs import DecoderSpec, VitSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn


RENAMES = (
    (r"^(?:model\.language_model\.|language_model\.model\.)", "text."),
    (r"^(?:language_model\.)?lm_head\.", "head."),
    (r"^(?:model\.)?multi_modal_projector\.", "projector."),
    (r"^(?:model\.)?vision_tower\.", "vision."),
    (r"^vision\.layernorm\.", "vision.post_layernorm."),
    (r"^vision\.embeddings\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.embeddings\.position_embeddings$", "vision.embeddings.position_embedding.weight"),
    (r"^vision\.embeddings\.patch_embeddings\.projection\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.encoder\.layer\.", "vision.encoder.layers."),
    (r"^(vision\.encoder\.layers\.\d+)\.attention\.projection_layer\.", r"\1.self_attn.out_proj."),
    (r"^(vision\.encoder\.layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"^(vision\.encoder\.layers\.\d+)\.layernorm_before\.", r"\1.layer_norm1."),
    (r"^(vision\.encoder\.layers\.\d+)\.layernorm_after\.", r"\1.layer_norm2."),
)

TOWER = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448,
    "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "attention_bias": False, "use_qk_norm": False,
    "norm_type": "layer_norm", "use_mean_pooling": True, "use_absolute_position_embeddings": True,
}  # fmt: skip
"""What transformers takes a key of vision_config for that config.json does not have."""

IMAGE, CLIP, START, END = "<IMG_CONTEXT>", "<video>", "<img>", "</img>"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InternVl(Family):
    model_type = "internvl"
    summary = "InternVL (-hf): InternViT, pixel shuffle, MLP, Qwen2, Qwen3 or Llama decoder; one tile or a static grid of tiles"
    published: ClassVar = {
        "_name_or_path": "OpenGVLab/InternVL3-8B-hf", "model_type": "internvl", "image_token_id": 151667,
        "downsample_ratio": 0.5, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
            "use_qk_norm": False, "norm_type": "layer_norm", "use_mean_pooling": True,
        },
        "text_config": {
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 151674, "rope_theta": 1000000.0,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "max_position_embeddings": 32768,
        },
    }  # fmt: skip

    def canonical(self, key: str) -> str:
        return renamed(key, RENAMES)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        spec = self._tower(checkpoint.config)
        tiles = tile_grid(request.image_size, spec.image)
        image = image_spec(
            checkpoint, MEAN, STD, height=spec.image, width=spec.image, resize="exact", tiles=tiles,
            resize_height=tiles[0] * spec.image, resize_width=tiles[1] * spec.image,
            overview="none" if tiles == (1, 1) else "last",
        )  # fmt: skip
        token = int(checkpoint.config.get("image_token_id", 151667))
        clip = request.frames > 1 and request.image_size is None
        mark, written = (CLIP, numbered(request.frames)) if clip else (IMAGE, START + IMAGE * image.parts + END)
        found = _shuffled.geometry(
            checkpoint, request, spec, self.decoder(checkpoint), image, token, mark=mark, written=written
        )
        return replace(found, media="video" if clip else "image")

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        from exporter.nn.vit import Vit

        return Vit(self._tower(checkpoint.config), taps, geometry.frames, in_tower)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> nn.Module:
        from exporter.nn.projectors import NormedProjector

        activation = str(checkpoint.config.get("projector_hidden_act", "gelu"))
        return NormedProjector(self._tower(checkpoint.config).dim, self.decoder(checkpoint).hidden, activation)

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        return decoder_spec(checkpoint.config)

    def _tower(self, config: dict[str, Any]) -> VitSpec:
        vision = TOWER | (config.get("vision_config") or {})
        if not vision["use_absolute_position_embeddings"]:
            raise CheckpointError("use_absolute_position_embeddings: false is not supported, only learned positions.")
        if config.get("vision_feature_select_strategy", "default") != "default":
            raise CheckpointError(
                "vision_feature_select_strategy: only 'default' (without the class token) is supported."
            )
        layers = int(vision["num_hidden_layers"])
        blocks = feature_blocks(config, layers, default=-1)
        return _shuffled.checked(VitSpec(
            hidden=int(vision["hidden_size"]),
            intermediate=int(vision["intermediate_size"]),
            blocks=blocks,
            layers=layers,
            heads=int(vision["num_attention_heads"]),
            patch=_square(vision["patch_size"]),
            image=_square(vision["image_size"]),
            eps=float(vision["layer_norm_eps"]),
            activation=str(vision["hidden_act"]),
            qkv_bias=bool(vision["attention_bias"]),
            qk_norm=bool(vision["use_qk_norm"]),
            rms_norm=vision["norm_type"] == "rms_norm",
            layer_scale=True,
            cls=True,
            pre_norm=False,
            post_norm=blocks == layers and not vision["use_mean_pooling"],
            patch_bias=True,
            merge=int(1 / float(config.get("downsample_ratio", 0.5))),
        ))  # fmt: skip


def numbered(frames: int) -> str:
    """What the processor writes for a clip of so many frames."""
    return "\n".join(f"Frame{n}: {START}{IMAGE}{END}" for n in range(1, frames + 1))


def _square(size: int | list[int]) -> int:
    sides = [size] if isinstance(size, int) else size
    if len(set(sides)) != 1:
        raise CheckpointError(
            f"The tower's {sides} pixels are not square; only square images and patches are supported."
        )
    return int(sides[0])


FAMILY = InternVl()
