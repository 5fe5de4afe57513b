"""FastVLM in transformers' layout: FastViTHD tower (timm's fastvit_mci3 or fastvit_mci4), two-layer MLP projector, Qwen2 decoder.

Images have one static size, a multiple of 64: the processor's 1024 or, exact, what `--image-size` says. Signals of attention are
those of the last stage. Apple's own files (model_type llava_qwen2) are not read: their tokenizer has no image token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.families._contract import (
    Geometry,
    Request,
    check_multiple,
    counted,
    image_spec,
    image_token,
    normalization,
    renamed,
    site_of,
)
from exporter.families.llava import RENAMES as LLAVA
from exporter.families.llava import Llava
from exporter.nn.specs import FastVitSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn


RENAMES = (*LLAVA, (r"^vision\.timm_model\.", "vision."))

ARCHITECTURES: dict[str, dict[str, tuple[int, ...]]] = {
    "fastvit_mci3": {"layers": (2, 12, 24, 4, 2), "embed_dims": (96, 192, 384, 768, 1536)},
    "fastvit_mci4": {"layers": (2, 12, 24, 4, 4), "embed_dims": (128, 256, 512, 1024, 2048)},
}
"""timm's; `model_args` of the config may say otherwise."""

SIDE = 1024


class FastVlm(Llava):
    model_type = "fast_vlm"
    summary = "FastVLM (transformers' layout): FastViTHD convolutional tower, MLP projector, Qwen2 decoder, static size"
    published: ClassVar = {
        "_name_or_path": "KamilaMila/FastVLM-7B", "model_type": "fast_vlm", "image_token_index": 151646,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "vision_config": {
            "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "model_args": {"inference_mode": True},
            "hidden_size": 3072,
        },
        "text_config": {
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152128, "rope_theta": 1000000.0,
        },
    }  # fmt: skip

    def canonical(self, key: str) -> str:
        return renamed(key, RENAMES)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        found = normalization(checkpoint).get("crop_size") or {}
        side = int(found if isinstance(found, int) else found.get("height", SIDE))
        height, width = request.image_size or (side, side)
        spec, decoder = self._tower(checkpoint.config, (height, width)), self.decoder(checkpoint)
        image = image_spec(
            checkpoint, (0.0,) * 3, (1.0,) * 3, height=height, width=width,
            resize="exact" if request.image_size else "shortest_edge",
        )  # fmt: skip
        return counted(
            checkpoint, decoder, image, site_of(spec, decoder, request.frames),
            "its tower is made of convolutions, which need every patch", image_token(checkpoint.config, 151646),
        )  # fmt: skip

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        from exporter.nn.fastvit import FastVit

        image = geometry.image
        return FastVit(self._tower(checkpoint.config, (image.height, image.width)), taps, geometry.frames)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> nn.Module:
        from exporter.nn.projectors import Projector

        config = checkpoint.config
        activation, bias = config.get("projector_hidden_act", "gelu"), config.get("multimodal_projector_bias", True)
        return Projector(geometry.tower.dim, geometry.hidden, str(activation), bool(bias))

    def _tower(self, config: dict[str, Any], size: tuple[int, int]) -> FastVitSpec:
        vision = config.get("vision_config") or {}
        name, said = vision.get("architecture", "fastvit_mci3"), vision.get("model_args") or {}
        if vision.get("model_type", "timm_wrapper") != "timm_wrapper" or name not in ARCHITECTURES:
            raise CheckpointError(f"Vision tower '{name}' is not supported. Supported: {', '.join(ARCHITECTURES)}.")
        if not said.get("inference_mode", False):
            raise CheckpointError(
                "The tower is in its training form (model_args.inference_mode is not true), where a convolution is several branches. "
                "Merge them first: timm.utils.reparameterize_model."
            )
        known = ARCHITECTURES[name] | said
        widths = tuple(known["embed_dims"])
        spec = FastVitSpec(
            widths=widths,
            depths=tuple(known["layers"]),
            ratios=tuple(known.get("mlp_ratios", (4,) * len(widths))),
            attends=tuple(i >= len(widths) - 2 for i in range(len(widths))),
            size=size,
        )
        check_multiple(size, spec.step)
        return spec


FAMILY = FastVlm()
