"""LLaVA and LLaVA-1.5: CLIP or SigLIP tower, two-layer MLP projector, Llama, Mistral, Qwen2, Qwen3, Gemma or OPT decoder.

One placeholder token per image or clip frame; the raster is fixed by the tower's image size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from exporter import clip
from exporter.checkpoint import Checkpoint
from exporter.families._contract import (
    ALIGNED,
    OPT_NAMES,
    PROMPT,
    Family,
    Geometry,
    Request,
    counted,
    decoder_spec,
    image_token,
    normalization,
    only_size,
    renamed,
    site_of,
)
from exporter.families._towers import llava_tower
from exporter.graphset import ImageSpec
from exporter.nn.specs import DecoderSpec, VitSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn


RENAMES = (
    (r"^(?:model\.language_model\.|language_model\.model\.)", "text."),
    (r"^(?:language_model\.)?lm_head\.", "head."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision."),
    (r"^(?:model\.)?multi_modal_projector\.", "projector."),
    *OPT_NAMES,
)


class Llava(Family):
    feature_layer, select = -2, "default"
    """What config.json means where it does not say `vision_feature_layer` and `vision_feature_select_strategy`."""
    model_type = "llava"
    summary = (
        "LLaVA-1.5 layout: CLIP or SigLIP tower, MLP projector, Llama, Mistral, Qwen2, Qwen3, Gemma or OPT decoder"
    )
    published: ClassVar = {
        "_name_or_path": "llava-hf/llava-1.5-7b-hf", "model_type": "llava", "image_token_index": 32000,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
    }  # fmt: skip

    def of(self, config: dict[str, Any]) -> Family:
        if "mm_vision_tower" not in config or "vision_config" in config:
            return self
        from exporter.families.llava_llama import FAMILY as original

        return original

    def canonical(self, key: str) -> str:
        return renamed(key, RENAMES)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        config = checkpoint.config
        spec = self.tower(config)
        only_size(request, spec.image)
        decoder = self.decoder(checkpoint)
        signals, shared = spec.signals | PROMPT, 0
        if request.clip is not None and spec.cls:
            signals, shared = signals | ALIGNED, clip.shared_width(request.clip, spec.hidden, spec.blocks)
        tower = replace(site_of(spec, decoder, request.frames), signals=signals, patch_dim=spec.hidden)
        token = image_token(config, 32000)
        inside = replace(tower, signals=spec.in_tower_signals)
        return counted(checkpoint, decoder, self._image(checkpoint, spec.image), tower, inside, token, shared=shared)

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        from exporter.nn.vit import Vit

        return Vit(self.tower(checkpoint.config), taps, geometry.frames, in_tower, geometry.shared)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> nn.Module | None:
        from exporter.nn.projectors import Projector

        config = checkpoint.config
        return Projector(
            self.tower(config).hidden,
            decoder_spec(config).hidden,
            str(config.get("projector_hidden_act", "gelu")),
            bool(config.get("multimodal_projector_bias", True)),
        )

    def tower(self, config: dict[str, Any]) -> VitSpec:
        return llava_tower(config, self.feature_layer, self.select)

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        # LLaVA's head caps no logits, whatever the decoder's own head does.
        return replace(decoder_spec(checkpoint.config), logit_cap=None)

    def _image(self, checkpoint: Checkpoint, side: int) -> ImageSpec:
        found = normalization(checkpoint)
        size = found.get("size") or {}
        if isinstance(size, int):
            size = {"shortest_edge": size}
        edge = size.get("shortest_edge")
        return ImageSpec(
            height=side,
            width=side,
            resize="shortest_edge" if edge else "exact",
            resize_height=int(edge or size.get("height", side)),
            resize_width=int(edge or size.get("width", side)),
            resample=int(found.get("resample", 3)),
            mean=tuple(found.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
            std=tuple(found.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        )


FAMILY = Llava()
