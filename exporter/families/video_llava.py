"""Video-LLaVA: LanguageBind's image tower for an image, its video tower for a clip; MLP projector, Llama decoder.

An image is that of LLaVA. A clip (`--frames` above 1; the model was trained on 8) stands behind one placeholder (`<video>`), frame
after frame, each with its class token in front. Reductions see the patches; the class tokens go on by themselves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.families._contract import Geometry, Request, counted, only_size, renamed, site_of
from exporter.families._towers import llava_tower
from exporter.families.llava import RENAMES as LLAVA
from exporter.families.llava import Llava
from exporter.graphset import ImageSpec
from exporter.nn.specs import VitSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn


RENAMES = (
    *LLAVA,
    (r"^(?:model\.)?image_tower\.(?:vision_model\.)?", "vision."),
    (r"^(?:model\.)?video_tower\.(?:vision_model\.)?", "vision.video."),
)

TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
}  # fmt: skip
"""What transformers takes for a `vision_config` that config.json does not have."""


class VideoLlava(Llava):
    model_type = "video_llava"
    summary = "Video-LLaVA: LanguageBind towers for images and for clips, MLP projector, Llama decoder"
    published: ClassVar = {
        "_name_or_path": "LanguageBind/Video-LLaVA-7B-hf", "model_type": "video_llava", "image_token_index": 32000,
        "video_token_index": 32001, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "vision_config": TOWER,
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
    }  # fmt: skip

    def canonical(self, key: str) -> str:
        return renamed(key, RENAMES)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        if request.frames == 1:
            return super().geometry(checkpoint, request)
        config = checkpoint.config
        spec, decoder = self._clip_tower(config), self.decoder(checkpoint)
        only_size(request, spec.image)
        tower = replace(site_of(spec, decoder, request.frames), class_tokens=True, patch_dim=spec.hidden)
        each = 1 + tower.tokens
        patches = [frame * each + 1 + i for frame in range(tower.frames) for i in range(tower.tokens)]
        found = counted(
            checkpoint, decoder, self._image(checkpoint, spec.image), tower, replace(tower, signals=spec.in_tower_signals),
            int(config.get("video_token_index", config.get("video_token_id", 32001))),
            placeholders=1, fixed=tower.frames, ids=[*patches, *range(0, tower.frames * each, each)],
        )  # fmt: skip
        return replace(found, media="video")

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        if geometry.media == "image":
            return super().vision(checkpoint, geometry, taps, in_tower)
        from exporter.nn.vit import NamedTower, Vit

        return NamedTower("video", Vit(self._clip_tower(checkpoint.config), taps, geometry.frames, in_tower))

    def tower(self, config: dict[str, Any]) -> VitSpec:
        vision = TOWER if not config.get("vision_config") else config["vision_config"]
        return llava_tower(config | {"vision_config": vision}, self.feature_layer, self.select)

    def _clip_tower(self, config: dict[str, Any]) -> VitSpec:
        # Whatever the strategy of images is, class tokens of frames stay.
        return self.tower(config | {"vision_feature_select_strategy": "default"})

    def _image(self, checkpoint: Checkpoint, side: int) -> ImageSpec:
        return replace(super()._image(checkpoint, side), resize="shortest_edge")


FAMILY = VideoLlava()
