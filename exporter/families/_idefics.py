"""Idefics3 and SmolVLM: SigLIP tower, pixel shuffle, one linear layer, Llama decoder. An image is one tile, or a grid of tiles
and the whole image behind them (`--image-size`); what marks the tiles is text of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporter.checkpoint import Checkpoint
from exporter.families import _shuffled
from exporter.families._contract import (
    Family,
    Geometry,
    Request,
    decoder_spec,
    image_spec,
    normalization,
    renamed,
    tile_grid,
)
from exporter.graphset import ImageSpec
from exporter.nn.specs import DecoderSpec, VitSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn


RENAMES = (
    (r"^(?:model\.)?text_model\.", "text."),
    (r"^lm_head\.", "head."),
    (r"^(?:model\.)?vision_model\.", "vision."),
    (r"^(?:model\.)?connector\.modality_projection\.", "projector."),
)

TOWER = {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16, "image_size": 224,
    "patch_size": 32, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
"""What transformers takes a key of vision_config for that config.json does not have."""

IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"


class Idefics(Family):
    def canonical(self, key: str) -> str:
        return renamed(key, RENAMES)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        config, spec = checkpoint.config, self._tower(checkpoint.config)
        tiles = tile_grid(request.image_size, spec.image)
        token = int(config.get("image_token_id", 128257))
        return _shuffled.geometry(
            checkpoint, request, spec, self.decoder(checkpoint), self._image(checkpoint, spec.image, tiles), token,
            mark=IMAGE, written=written(*tiles),
        )  # fmt: skip

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        from exporter.nn.vit import Vit

        return Vit(self._tower(checkpoint.config), taps, geometry.frames, in_tower)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> nn.Module:
        from exporter.nn.projectors import Projection

        return Projection("proj", self._tower(checkpoint.config).dim, self.decoder(checkpoint).hidden, bias=False)

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        return decoder_spec(checkpoint.config)

    def _tower(self, config: dict[str, Any]) -> VitSpec:
        # Its positions follow the share of the image that lies before a patch: those of a whole tile just count.
        vision = TOWER | (config.get("vision_config") or {})
        return _shuffled.checked(VitSpec(
            hidden=int(vision["hidden_size"]),
            intermediate=int(vision["intermediate_size"]),
            blocks=int(vision["num_hidden_layers"]),
            layers=int(vision["num_hidden_layers"]),
            heads=int(vision["num_attention_heads"]),
            patch=int(vision["patch_size"]),
            image=int(vision["image_size"]),
            eps=float(vision["layer_norm_eps"]),
            activation=str(vision["hidden_act"]),
            cls=False,
            pre_norm=False,
            post_norm=True,
            patch_bias=True,
            merge=int(config.get("scale_factor", 2)),
        ))  # fmt: skip

    def _image(self, checkpoint: Checkpoint, side: int, tiles: tuple[int, int]) -> ImageSpec:
        edge = (normalization(checkpoint).get("size") or {}).get("longest_edge", 4 * side)
        return image_spec(
            checkpoint, (0.5,) * 3, (0.5,) * 3, resample=1, height=side, width=side, resize="exact",
            resize_height=tiles[0] * side, resize_width=tiles[1] * side, tiles=tiles,
            overview="none" if tiles == (1, 1) else "last, of the resized image", longest_edge=int(edge),
        )  # fmt: skip


def written(rows: int, cols: int) -> str:
    """What the processor writes for one image of so many tiles."""
    whole = f"{AROUND}{WHOLE}{IMAGE}{AROUND}"
    if (rows, cols) == (1, 1):
        return whole
    lines = ("".join(f"{AROUND}<row_{r + 1}_col_{c + 1}>{IMAGE}" for c in range(cols)) for r in range(rows))
    return "".join(f"{line}\n" for line in lines) + "\n" + whole
