"""Models in the layout of LLaVA's own code, which those who train projectors of their own publish in: CLIP tower, `mm_projector`,
Llama decoder, all in one flat config.json.

Checkpoints may lack their tower; `--clip-model` brings it. There is no image token: a prompt is cut where an image stands, and
its parts are encoded apart, as the published code does it. Prompts are Vicuna's.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from exporter import clip
from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.families._contract import Family, Geometry, Request, image_spec, renamed
from exporter.families.llava import Llava
from exporter.graphset import ImageSpec
from exporter.nn.specs import DecoderSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn

    from exporter.checkpoint import Place


RENAMES = (
    (r"^model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?", "vision."),
    (r"^model\.mm_projector\.0\.", "projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "projector.linear_2."),
    (r"^model\.mm_projector\.", "projector."),
    (r"^model\.", "text."),
    (r"^lm_head\.", "head."),
)

CLIP_L: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14": {**CLIP_L, "image_size": 224},
    "clip-vit-large-patch14-336": {**CLIP_L, "image_size": 336},
}
"""Towers that config.json only names."""

MLP = "mlp2x_gelu"

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


class Original(Llava):
    compressors: ClassVar[dict[str, str]] = {}
    """What the model's own projector is known by, `mm_projector_type` or a tensor that only it has → the spec of ours that it is."""

    def of(self, config: dict[str, Any]) -> Family:
        return self

    def canonical(self, key: str) -> str:
        return renamed(key, RENAMES)

    def reads(self, checkpoint: Checkpoint, request: Request) -> Checkpoint:
        return WithTower(super().reads(checkpoint, request), request.clip)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        config = checkpoint.config
        if config.get("mm_use_im_start_end"):
            raise CheckpointError("mm_use_im_start_end: an image between tokens of its own is not supported.")
        if str(config.get("image_aspect_ratio")).startswith("anyres"):
            raise CheckpointError(
                f"image_aspect_ratio '{config['image_aspect_ratio']}': tiles are not supported in the layout of LLaVA's own code. "
                "Take the checkpoint in transformers' layout, model_type llava_next or llava_onevision."
            )
        found = super().geometry(_as_llava(checkpoint), request)
        known = {_projector_type(config), *_tensors(checkpoint)}
        compressor = next((spec for mark, spec in self.compressors.items() if mark in known), "")
        return replace(found, image_token=IMAGE_TOKEN, spliced=IMAGE, template=TEMPLATE, compressor=compressor)

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        return super().vision(_as_llava(checkpoint), geometry, taps, in_tower)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> nn.Module | None:
        if geometry.compressor:
            return None
        kind = _projector_type(checkpoint.config)
        if kind != MLP:
            raise CheckpointError(
                f"mm_projector_type '{kind}' is not supported, only '{MLP}'. If it is one that shortens, name the reduction: --reduce."
            )
        return super().projector(_as_llava(checkpoint), geometry)

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


def _tensors(checkpoint: Checkpoint) -> Collection[str]:
    """Their names in the files; none where there is nothing but a config, which is enough to plan."""
    try:
        return {place.key for place in checkpoint._where.values()}
    except CheckpointError:
        return ()


def _projector_type(config: dict[str, Any]) -> str:
    return str(config.get("mm_projector_type", "linear"))


def _as_llava(checkpoint: Checkpoint) -> Checkpoint:
    """The same with the config that LLaVA would have."""
    config = checkpoint.config
    if "text_config" in config:
        return checkpoint  # is one already
    selected = config.get("mm_vision_select_feature", "patch")
    if selected != "patch":
        raise CheckpointError(f"mm_vision_select_feature '{selected}' is not supported, only 'patch'.")
    name = config.get("mm_vision_tower")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{checkpoint.folder}/config.json names no `mm_vision_tower`: expected the layout of LLaVA's own code. Checkpoints that keep "
            "tower and language model in folders of their own (VILA, NVILA) are not read."
        )
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
