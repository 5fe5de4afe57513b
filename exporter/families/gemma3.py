"""Gemma 3 with images: SigLIP tower, 4×4 mean pooling, norm and one matrix, Gemma 3 decoder in which the tokens of an image see
each other. Images only as a whole: pan-and-scan crops are images of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.families._contract import (
    Family,
    Geometry,
    Request,
    counted,
    decoder_spec,
    image_spec,
    image_token,
    only_size,
    renamed,
    site_of,
)
from exporter.families._shuffled import checked
from exporter.families._towers import siglip
from exporter.families.llava import RENAMES
from exporter.nn.specs import DecoderSpec, VitSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn


START, TOKEN, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"


class Gemma3(Family):
    model_type = "gemma3"
    summary = "Gemma 3: SigLIP tower, mean pooling, decoder in which the tokens of an image see each other"
    published: ClassVar = {
        "_name_or_path": "google/gemma-3-4b-it", "model_type": "gemma3", "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
        },
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    }  # fmt: skip

    def canonical(self, key: str) -> str:
        return renamed(key, RENAMES)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        spec, decoder = self._tower(checkpoint.config), self.decoder(checkpoint)
        side = spec.image
        only_size(request, side)
        tower = site_of(spec, decoder, request.frames)
        image = image_spec(checkpoint, (0.5,) * 3, (0.5,) * 3, resample=2, height=side, width=side, resize="exact")
        return counted(
            checkpoint, decoder, image, tower,
            f"it averages {spec.merge}×{spec.merge} patches behind the tower, so the tower cannot be shortened",
            image_token(checkpoint.config, 262144),
            mark=START, written=f"\n\n{START}{TOKEN}{END}\n\n", sees="image",
        )  # fmt: skip

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        from exporter.nn.vit import Vit

        return Vit(self._tower(checkpoint.config), taps, geometry.frames, in_tower)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> nn.Module:
        from exporter.nn.projectors import SoftProjector

        spec = self._tower(checkpoint.config)
        return SoftProjector(spec.dim, self.decoder(checkpoint).hidden, spec.eps)

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        # The head of the model with images caps no logits.
        return replace(decoder_spec(checkpoint.config), reach=True, logit_cap=None)

    def _tower(self, config: dict[str, Any]) -> VitSpec:
        spec = siglip(config)
        merge = spec.side // round(int(config.get("mm_tokens_per_image", 256)) ** 0.5)
        return checked(replace(spec, merge=merge, pooled=True))


FAMILY = Gemma3()
