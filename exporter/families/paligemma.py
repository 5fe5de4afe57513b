"""PaliGemma and PaliGemma 2: SigLIP tower, one linear layer, Gemma or Gemma 2 decoder in which all tokens of the prompt see each
other. A prompt is the images, the beginning of text, the task and a line break."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

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
    text_config,
)
from exporter.families._towers import siglip
from exporter.families.llava import RENAMES
from exporter.nn.specs import DecoderSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn


TEMPLATE = (
    "{% if messages | length > 1 %}{{ raise_exception('PaliGemma answers one question; it has no conversations') }}{% endif %}"
    "{% set content = messages[0]['content'] %}"
    "{% if content is string %}{{ bos_token + content + '\n' }}{% else %}"
    "{% for part in content if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{{ bos_token }}{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ '\n' }}{% endif %}"
)


class PaliGemma(Family):
    model_type = "paligemma"
    summary = "PaliGemma and PaliGemma 2: SigLIP tower, linear projector, Gemma decoder in which a prompt's tokens see each other"
    published: ClassVar = {
        "_name_or_path": "google/paligemma2-3b-mix-224", "model_type": "paligemma", "image_token_index": 257152,
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "patch_size": 14, "projection_dim": 2304,
        },
        "text_config": {
            "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_key_value_heads": 4, "vocab_size": 257216,
        },
    }  # fmt: skip

    def canonical(self, key: str) -> str:
        return renamed(key, RENAMES)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        spec, decoder = siglip(checkpoint.config), self.decoder(checkpoint)
        side = spec.image
        only_size(request, side)
        tower = site_of(spec, decoder, request.frames)
        image = image_spec(checkpoint, (0.5,) * 3, (0.5,) * 3, height=side, width=side, resize="exact")
        return counted(
            checkpoint, decoder, image, tower, replace(tower, signals=spec.in_tower_signals),
            image_token(checkpoint.config, 257152),
            template=TEMPLATE, sees="prompt",
        )  # fmt: skip

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        from exporter.nn.vit import Vit

        return Vit(siglip(checkpoint.config), taps, geometry.frames, in_tower)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> nn.Module:
        from exporter.nn.projectors import Projection

        return Projection("linear", siglip(checkpoint.config).dim, self.decoder(checkpoint).hidden, bias=True)

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        # What some configs call bidirectional is the prompt: what follows it is causal.
        text = text_config(checkpoint.config) | {"use_bidirectional_attention": False}
        return replace(decoder_spec({"text_config": text}), reach=True)


FAMILY = PaliGemma()
