"""MobileVLM and MobileVLM V2 as published: CLIP tower, a projector that leaves a quarter of the tokens (LDP, LDPv2), Llama decoder.

The first version's checkpoints do not hold their tower; `--clip-model` brings it. There is no image token: a prompt is cut where an
image stands, and its parts are encoded apart, as the published code does it. Prompts are Vicuna's.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from exporter import clip
from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.families._contract import Geometry, Request, image_spec, renamed
from exporter.families.llava import Llava
from exporter.graphset import ImageSpec
from exporter.nn.specs import DecoderSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn

    from exporter.checkpoint import Place


RENAMES = (
    (r"^model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?", "vision."),
    (r"^model\.mm_projector\.", "projector."),
    (r"^model\.", "text."),
    (r"^lm_head\.", "head."),
)

TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    },
}  # fmt: skip
"""Towers that config.json only names."""

COMPRESSORS = {"ldpnet": "ldp", "ldpnetv2": "ldpv2"}
"""`mm_projector_type` → ours."""

IMAGE, IMAGE_TOKEN = "<image>", -200
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEMPLATE = (
    '{{ "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite '
    "answers to the user's questions. \" }}"
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>\n' }}"
    "{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else eos_token | default('</s>') }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class MobileVlm(Llava):
    model_type = "mobilevlm"
    summary = (
        "MobileVLM and MobileVLM V2 as published: CLIP tower, LDP or LDPv2 projector (a quarter of the tokens), Llama"
    )
    published: ClassVar = {
        "_name_or_path": "mtgv/MobileVLM_V2-1.7B", "model_type": "mobilevlm", "mm_projector_type": "ldpnetv2",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2, "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 32000,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "image_aspect_ratio": "pad",
    }  # fmt: skip

    def canonical(self, key: str) -> str:
        return renamed(key, RENAMES)

    def reads(self, checkpoint: Checkpoint, request: Request) -> Checkpoint:
        return WithTower(super().reads(checkpoint, request), request.clip)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        config = checkpoint.config
        kind = config.get("mm_projector_type", "linear")
        if kind not in COMPRESSORS:
            raise CheckpointError(f"mm_projector_type '{kind}' is not supported. Supported: {', '.join(COMPRESSORS)}.")
        if config.get("mm_use_im_start_end"):
            raise CheckpointError("mm_use_im_start_end: an image between tokens of its own is not supported.")
        found = super().geometry(_as_llava(checkpoint), request)
        return replace(found, image_token=IMAGE_TOKEN, spliced=IMAGE, template=TEMPLATE, compressor=COMPRESSORS[kind])

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        return super().vision(_as_llava(checkpoint), geometry, taps, in_tower)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> None:
        return None

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        return super().decoder(_as_llava(checkpoint))

    def _image(self, checkpoint: Checkpoint, side: int) -> ImageSpec:
        padded = checkpoint.config.get("image_aspect_ratio") == "pad"
        how = "padded" if padded else "shortest_edge"
        return image_spec(checkpoint, MEAN, STD, height=side, width=side, resize=how)


class WithTower(Checkpoint):
    """A checkpoint that may have its tower in a CLIP checkpoint, whose `vision_config` counts then."""

    def __init__(self, checkpoint: Checkpoint, tower: Checkpoint | None) -> None:
        super().__init__(checkpoint.folder, checkpoint._canonical)
        self.config = checkpoint.config
        self.tower = None if tower is None else tower.named(lambda key: re.sub(r"^vision_model\.", "vision.", key))
        if tower is not None:
            self.config = {**self.config, "vision_config": clip.part(tower, "vision")}

    @cached_property
    def _where(self) -> dict[str, Place]:
        tower = {} if self.tower is None else self.tower._where
        return {**{name: place for name, place in tower.items() if name.startswith("vision.")}, **super()._where}

    def _found(self, name: str) -> Place:
        if name.startswith("vision.") and name not in self:
            raise CheckpointError(
                f"{self.folder} does not hold its tower, {self.config.get('mm_vision_tower')}. Name that checkpoint: --clip-model."
            )
        return super()._found(name)


def _as_llava(checkpoint: Checkpoint) -> Checkpoint:
    """The same with the config that LLaVA would have."""
    config = checkpoint.config
    if "text_config" in config:
        return checkpoint  # is one already
    selected = config.get("mm_vision_select_feature", "patch")
    if selected != "patch":
        raise CheckpointError(f"mm_vision_select_feature '{selected}' is not supported, only 'patch'.")
    name = str(config.get("mm_vision_tower"))
    tower = config.get("vision_config") or TOWERS.get(name.rstrip("/").rpartition("/")[2])
    if tower is None:
        raise CheckpointError(
            f"mm_vision_tower '{name}' is unknown (known: {', '.join(TOWERS)}). Name its checkpoint: --clip-model."
        )
    return checkpoint.with_config({
        **{name: config[name] for name in ("model_type", "image_aspect_ratio", "eos_token_id") if name in config},
        "text_config": config | {"model_type": "llama"},
        "vision_config": tower,
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default",
    })  # fmt: skip


FAMILY = MobileVlm()
