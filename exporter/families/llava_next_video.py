"""LLaVA-NeXT-Video: images as LLaVA-NeXT; of a clip, each frame's patches are averaged 2×2 before the projector, and all frames
stand behind one placeholder (`<video>`), without row ends."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError, UsageError
from exporter.families._contract import Geometry, Request, counted, image_spec, site_of
from exporter.families._shuffled import checked
from exporter.families.llava_next import LlavaNext
from exporter.nn.specs import VitSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn


class LlavaNextVideo(LlavaNext):
    model_type = "llava_next_video"
    summary = "LLaVA-NeXT-Video: images as LLaVA-NeXT, clips with pooled frames, Llama, Mistral or Qwen2 decoder"
    image_token = 32001
    published: ClassVar = {
        "_name_or_path": "llava-hf/LLaVA-NeXT-Video-7B-hf", "model_type": "llava_next_video", "image_token_index": 32001,
        "video_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "spatial_pool_mode": "average", "spatial_pool_stride": 2,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
        "text_config": {
            "model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064,
        },
    }  # fmt: skip

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        if request.frames == 1:
            return super().geometry(checkpoint, request)
        spec, decoder = self._pooled(checkpoint.config), self.decoder(checkpoint)
        side = spec.image
        if request.image_size not in (None, (side, side)):
            raise UsageError(f"The frames of a clip are {side}×{side} and have no tiles; leave --image-size out.")
        tower = site_of(spec, decoder, request.frames)
        image = image_spec(checkpoint, *self.normal, height=side, width=side, resize="shortest_edge")
        found = counted(
            checkpoint, decoder, image, tower,
            f"it averages {spec.merge}×{spec.merge} patches of a frame, so the tower cannot be shortened",
            int(checkpoint.config.get("video_token_index", checkpoint.config.get("video_token_id", 32000))), placeholders=1,
        )  # fmt: skip
        return replace(found, media="video")

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        if geometry.media == "image":
            return super().vision(checkpoint, geometry, taps, in_tower)
        from exporter.nn.vit import Vit

        return Vit(self._pooled(checkpoint.config), taps, geometry.frames)

    def _pooled(self, config: dict[str, Any]) -> VitSpec:
        mode = config.get("spatial_pool_mode", "average")
        if mode != "average":
            raise CheckpointError(f"spatial_pool_mode '{mode}' is not supported, only 'average'.")
        return checked(replace(self.tower(config), merge=int(config.get("spatial_pool_stride", 2)), pooled=True))


FAMILY = LlavaNextVideo()
