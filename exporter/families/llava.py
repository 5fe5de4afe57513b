"""LLaVA and LLaVA-1.5: CLIP or SigLIP tower, two-layer MLP projector, Llama, Mistral, Qwen2, Qwen3 or Gemma decoder.

One placeholder token per image or clip frame; the raster is fixed by the tower's image size.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from exporter import clip
from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError, UsageError
from exporter.families._contract import (
    ALIGNED,
    PROMPT,
    Family,
    Geometry,
    Request,
    decoder_spec,
    eos_tokens,
    normalization,
)
from exporter.graphset import ImageSpec
from exporter.nn.specs import DecoderSpec, VitSpec
from graphs._contract import InTower, Site

if TYPE_CHECKING:
    from torch import nn


RENAMES = (
    (r"^(?:model\.language_model\.|language_model\.model\.)", "text."),
    (r"^(?:language_model\.)?lm_head\.", "head."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision."),
    (r"^(?:model\.)?multi_modal_projector\.", "projector."),
)


class Llava(Family):
    model_type = "llava"
    summary = "LLaVA-1.5 layout: CLIP or SigLIP tower, MLP projector, Llama, Mistral, Qwen2, Qwen3 or Gemma decoder"
    published: ClassVar = {
        "_name_or_path": "llava-hf/llava-1.5-7b-hf", "model_type": "llava", "image_token_index": 32000,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
    }  # fmt: skip

    def canonical(self, key: str) -> str:
        for pattern, name in RENAMES:
            if re.match(pattern, key):
                return re.sub(pattern, name, key)
        return key

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        config = checkpoint.config
        spec = self._tower(config)
        if request.image_size not in (None, (spec.image, spec.image)):
            raise UsageError(
                f"This tower takes {spec.image}×{spec.image} images only (learned positions); leave --image-size out."
            )
        decoder = self.decoder(checkpoint)
        rows, cols = spec.grid
        tokens = rows * cols
        signals, shared = spec.signals | PROMPT, 0
        if request.clip is not None and spec.cls:
            signals, shared = signals | ALIGNED, clip.shared_width(request.clip, spec.hidden, spec.blocks)
        tower = Site(
            tokens, request.frames, spec.grid, signals, spec.blocks,
            dim=spec.hidden, patch_dim=spec.hidden, llm_dim=decoder.hidden,
        )  # fmt: skip
        return Geometry(
            image=self._image(checkpoint, spec.image),
            frames=request.frames,
            placeholders=request.frames,
            grid=spec.grid,
            tower=tower,
            in_tower=replace(tower, signals=spec.in_tower_signals),
            ids=tuple((i,) for i in range(tokens)),
            span=tokens,
            position_axes=1,
            hidden=decoder.hidden,
            layers=decoder.layers,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            vocab=decoder.vocab,
            image_token=int(config.get("image_token_index", config.get("image_token_id", 32000))),
            eos=eos_tokens(checkpoint),
            shared=shared,
        )

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        from exporter.nn.vit import Vit

        return Vit(self._tower(checkpoint.config), taps, geometry.frames, in_tower, geometry.shared)

    def projector(self, checkpoint: Checkpoint) -> nn.Module:
        from exporter.nn.vit import Projector

        config = checkpoint.config
        return Projector(
            int(config["vision_config"]["hidden_size"]),
            decoder_spec(config).hidden,
            str(config.get("projector_hidden_act", "gelu")),
            bool(config.get("multimodal_projector_bias", True)),
        )

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        # LLaVA's head caps no logits, whatever the decoder's own head does.
        return replace(decoder_spec(checkpoint.config), logit_cap=None)

    def _tower(self, config: dict[str, Any]) -> VitSpec:
        vision = config.get("vision_config") or {}
        kind = vision.get("model_type", "clip_vision_model")
        if kind not in ("clip_vision_model", "siglip_vision_model"):
            raise CheckpointError(
                f"Vision tower '{kind}' is not supported. Supported: clip_vision_model, siglip_vision_model."
            )
        is_clip = kind == "clip_vision_model"
        layers = int(vision["num_hidden_layers"])
        layer = config.get("vision_feature_layer", -2)
        if not isinstance(layer, int):
            raise CheckpointError(
                f"vision_feature_layer {layer!r}: several feature layers are not supported, only one."
            )
        blocks = layer if layer >= 0 else layers + 1 + layer
        if not 1 <= blocks <= layers:
            raise CheckpointError(f"vision_feature_layer {layer} is outside the tower's {layers} blocks.")
        select = config.get("vision_feature_select_strategy", "default")
        if is_clip != (select == "default"):
            raise CheckpointError(
                f"vision_feature_select_strategy '{select}' with '{kind}' is not supported: a CLIP tower drops its class "
                "token ('default'), a SigLIP tower has none ('full')."
            )
        return VitSpec(
            hidden=int(vision["hidden_size"]),
            intermediate=int(vision["intermediate_size"]),
            blocks=blocks,
            heads=int(vision["num_attention_heads"]),
            patch=int(vision["patch_size"]),
            image=int(vision["image_size"]),
            eps=float(vision.get("layer_norm_eps", 1e-5 if is_clip else 1e-6)),
            activation=str(vision.get("hidden_act", "quick_gelu" if is_clip else "gelu_pytorch_tanh")),
            cls=is_clip,
            pre_norm=is_clip,
            patch_bias=not is_clip,
            layers=layers,
        )

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
