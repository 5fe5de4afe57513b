"""Mistral Small 3.1 and 3.2: Pixtral tower (rotary positions), 2×2 patch merger, MLP, Mistral decoder; exported for one static size.

Every row of an image has a placeholder of its own, and a break behind it, which is text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.families._contract import (
    Family,
    Geometry,
    Request,
    check_multiple,
    counted,
    decoder_spec,
    image_spec,
    image_token,
    renamed,
    site_of,
)
from exporter.families._towers import feature_blocks
from exporter.families.llava import RENAMES as LLAVA
from exporter.nn.specs import DecoderSpec, PixtralSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn


RENAMES = (*LLAVA, (r"^vision\.(patch_conv|ln_pre)\.", r"vision.patches.\1."))

TOWER = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
    "hidden_act": "gelu",
}  # fmt: skip
"""What transformers takes a key of vision_config for that config.json does not have."""

DEFAULT_SIZE = (448, 448)
"""Image size when none is asked for: 256 visual tokens with 14-pixel patches and the 2×2 merger."""

TOKEN, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Mistral3(Family):
    model_type = "mistral3"
    summary = "Mistral Small 3.1 and 3.2: Pixtral tower, 2×2 patch merger, MLP, Mistral decoder, static size"
    published: ClassVar = {
        "_name_or_path": "mistralai/Mistral-Small-3.1-24B-Instruct-2503", "model_type": "mistral3", "image_token_index": 10,
        "spatial_merge_size": 2, "vision_feature_layer": -1, "multimodal_projector_bias": False,
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 1540, "patch_size": 14, "hidden_act": "silu", "rope_theta": 10000.0,
        },
        "text_config": {
            "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000000.0, "sliding_window": None,
        },
    }  # fmt: skip

    def canonical(self, key: str) -> str:
        return renamed(key, RENAMES)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        height, width = request.image_size or DEFAULT_SIZE
        spec, decoder = self._tower(checkpoint.config, (height, width)), self.decoder(checkpoint)
        rows, _ = spec.grid
        tower = site_of(spec, decoder, request.frames)
        image = image_spec(checkpoint, MEAN, STD, height=height, width=width, resize="exact")
        return counted(
            checkpoint, decoder, image, tower,
            f"its projector joins {spec.merge}×{spec.merge} patches, so the tower cannot be shortened",
            image_token(checkpoint.config, 10),
            placeholders=request.frames * rows, mark=TOKEN, written=BREAK.join([TOKEN] * rows) + END,
        )  # fmt: skip

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        from exporter.nn.pixtral import Pixtral

        image = geometry.image
        return Pixtral(self._tower(checkpoint.config, (image.height, image.width)), taps, geometry.frames)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> nn.Module:
        from exporter.nn.projectors import MergingProjector

        config = checkpoint.config
        decoder = self.decoder(checkpoint)
        return MergingProjector(
            int((TOWER | config["vision_config"])["hidden_size"]),
            decoder.hidden,
            int(config.get("spatial_merge_size", 2)),
            decoder.eps,
            str(config.get("projector_hidden_act", "gelu")),
            bool(config.get("multimodal_projector_bias", False)),
        )

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        return decoder_spec(checkpoint.config)

    def _tower(self, config: dict[str, Any], size: tuple[int, int]) -> PixtralSpec:
        vision = TOWER | (config.get("vision_config") or {})
        if vision.get("model_type", "pixtral") != "pixtral":
            raise CheckpointError(f"Vision tower '{vision['model_type']}' is not supported. Supported: pixtral.")
        patch, merge = int(vision["patch_size"]), int(config.get("spatial_merge_size", 2))
        check_multiple(size, patch * merge)
        layers = int(vision["num_hidden_layers"])
        rope = vision.get("rope_parameters") or {}
        return PixtralSpec(
            hidden=int(vision["hidden_size"]),
            intermediate=int(vision["intermediate_size"]),
            heads=int(vision["num_attention_heads"]),
            eps=1e-5,
            activation=str(vision["hidden_act"]),
            blocks=feature_blocks(config, layers, default=-1),
            layers=layers,
            patch=patch,
            merge=merge,
            patches=(size[0] // patch, size[1] // patch),
            theta=float(rope.get("rope_theta") or vision.get("rope_theta") or 10000.0),
        )


FAMILY = Mistral3()
