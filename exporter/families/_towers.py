"""The towers of LLaVA-style families from `vision_config` and `vision_feature_*`: CLIP, SigLIP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from exporter.errors import CheckpointError
from exporter.nn.specs import VitSpec

KINDS = ("clip_vision_model", "siglip_vision_model")


def feature_blocks(config: dict[str, Any], layers: int, default: int) -> int:
    """Blocks up to the features that `vision_feature_layer` names."""
    layer = config.get("vision_feature_layer", default)
    if isinstance(layer, list) and len(layer) == 1:
        (layer,) = layer
    if not isinstance(layer, int):
        raise CheckpointError(f"vision_feature_layer {layer!r}: several feature layers are not supported, only one.")
    blocks = layer if layer >= 0 else layers + 1 + layer
    if not 1 <= blocks <= layers:
        raise CheckpointError(f"vision_feature_layer {layer} is outside the tower's {layers} blocks.")
    return blocks


def llava_tower(config: dict[str, Any], layer: int, select: str) -> VitSpec:
    """A CLIP or SigLIP tower.

    Args:
        layer, select: what the family takes for `vision_feature_layer` and `vision_feature_select_strategy`, where
            config.json does not say.
    """
    vision = config.get("vision_config") or {}
    kind = vision.get("model_type", KINDS[0])
    if kind not in KINDS:
        raise CheckpointError(f"Vision tower '{kind}' is not supported. Supported: {', '.join(KINDS)}.")
    is_clip = kind == KINDS[0]
    layers = int(vision["num_hidden_layers"])
    select = config.get("vision_feature_select_strategy", select)
    if is_clip != (select == "default"):
        raise CheckpointError(
            f"vision_feature_select_strategy '{select}' with '{kind}' is not supported: a CLIP tower drops its class "
            "token ('default'), a SigLIP tower has none ('full')."
        )
    return VitSpec(
        hidden=int(vision["hidden_size"]),
        intermediate=int(vision["intermediate_size"]),
        blocks=feature_blocks(config, layers, layer),
        heads=int(vision["num_attention_heads"]),
        patch=int(vision["patch_size"]),
        image=int(vision.get("image_size", 224)),
        eps=float(vision.get("layer_norm_eps", 1e-5 if is_clip else 1e-6)),
        activation=str(vision.get("hidden_act", "quick_gelu" if is_clip else "gelu_pytorch_tanh")),
        cls=is_clip,
        pre_norm=is_clip,
        patch_bias=not is_clip,
        layers=layers,
    )


def siglip(config: dict[str, Any]) -> VitSpec:
    """A SigLIP tower that is used whole, its last norm included."""
    used = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return replace(llava_tower(config | used, -1, "full"), post_norm=True)
