"""LLaVA-OneVision: SigLIP tower on the whole image and on tiles, MLP projector, row ends, Qwen2 decoder.

`--image-size` names the grid, one of the checkpoint's `image_grid_pinpoints`; without it an image is a single picture with one row
end. `--frames` above 1 is a clip behind one placeholder (`<video>`): each frame's tokens are projected and halved bilinearly, rows and
columns, and one row end follows all. With the `--image-size` of a single picture, it is so many images instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.families._anyres import AnyRes, most_tiles
from exporter.families._contract import Geometry, Request, counted, image_spec, site_of
from exporter.families.llava import Llava
from exporter.nn.specs import VitSpec
from graphs._contract import InTower, Site

if TYPE_CHECKING:
    from torch import nn


class LlavaOnevision(AnyRes):
    model_type = "llava_onevision"
    summary = (
        "LLaVA-OneVision: SigLIP tower, static grid of tiles or clips with pooled frames, MLP projector, Qwen2 decoder"
    )
    feature_layer, select = -1, "full"
    image_token = 151646
    normal = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    published: ClassVar = {
        "_name_or_path": "llava-hf/llava-onevision-qwen2-7b-ov-hf", "model_type": "llava_onevision",
        "image_token_index": 151646, "video_token_index": 151647, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
            "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
        },
        "text_config": {
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152128, "rope_theta": 1000000.0,
        },
    }  # fmt: skip

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        side = self.tower(checkpoint.config).image
        if request.frames > 1 and request.image_size is None:
            return self._clip(checkpoint, request.frames, side)
        if request.frames > 1 and request.image_size == (side, side):
            request = replace(request, image_size=None)
        return super().geometry(checkpoint, request)

    def _clip(self, checkpoint: Checkpoint, frames: int, side: int) -> Geometry:
        decoder, spec = self.decoder(checkpoint), self.tower(checkpoint.config)
        found = counted(
            checkpoint, decoder, image_spec(checkpoint, *self.normal, height=side, width=side, resize="exact"),
            _halved(site_of(spec, decoder, frames), spec),
            "a frame's tokens are pooled behind the projector, so the tower cannot be shortened",
            int(checkpoint.config.get("video_token_index", checkpoint.config.get("video_token_id", 151647))),
            placeholders=1, fixed=1,
        )  # fmt: skip
        return replace(found, media="video")

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        if geometry.media == "image":
            return super().vision(checkpoint, geometry, taps, in_tower)
        from exporter.nn.vit import HalvedVit

        projector = Llava.projector(self, checkpoint, geometry)
        return HalvedVit(self.tower(checkpoint.config), taps, geometry.frames, projector)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> nn.Module:
        from exporter.nn.projectors import RowEnds

        clip = geometry.media == "video"  # projected in the tower, as what is pooled has to be
        return RowEnds(geometry.hidden) if clip else super().projector(checkpoint, geometry)

    def check(self, config: dict[str, Any], tiles: tuple[int, int]) -> None:
        most_tiles(str(config.get("vision_aspect_ratio", "anyres_max_9")), tiles)


def _halved(site: Site, spec: VitSpec) -> Site:
    """What is left of a frame's raster, and its signals: those of a patch go with it, and the others of a block are pooled."""
    rows, cols = (-(-side // 2) for side in spec.grid)
    lost = {name for name in site.signals if name.partition("@")[0] in ("hidden", "patches") and "@" in name}
    return replace(site, tokens=rows * cols, grid=(rows, cols), signals=site.signals - lost, dim=site.llm_dim)


FAMILY = LlavaOnevision()
