"""LLaVA-NeXT and LLaVA-OneVision: an image is seen whole, and cut into tiles whose tokens are written row by row over all of them,
with a learned vector at the end of each row.

The grid of tiles is static (`--image-size`), and an image of another shape is stretched onto it, where the families' processors
put it between black bars and take their tokens out again. For images of the grid's shape it is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.errors import UsageError
from exporter.families._contract import Geometry, Request, counted, image_spec, image_token, renamed, site_of, tile_grid
from exporter.families.llava import Llava
from exporter.graphset import ImageSpec
from exporter.nn.specs import VitSpec

RENAMES = ((r"^(?:model\.)?image_newline$", "projector.image_newline"),)


class AnyRes(Llava):
    image_token: ClassVar[int]
    normal: ClassVar[tuple[Sequence[float], Sequence[float]]]

    def canonical(self, key: str) -> str:
        return renamed(super().canonical(key), RENAMES)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        config = checkpoint.config
        spec, decoder = self.tower(config), self.decoder(checkpoint)
        image = self.image(checkpoint, spec, request)
        rows, cols = spec.grid
        tower = site_of(spec, decoder, request.frames * image.parts)
        ids = row_by_row(spec.grid, image.tiles) if image.parts > 1 else range(rows * cols + 1)
        return counted(
            checkpoint, decoder, image, tower, replace(tower, signals=spec.in_tower_signals),
            image_token(config, self.image_token),
            placeholders=request.frames, fixed=len(ids) - rows * cols * image.parts, ids=ids,
        )  # fmt: skip

    def image(self, checkpoint: Checkpoint, spec: VitSpec, request: Request) -> ImageSpec:
        side = spec.image
        if request.image_size is None:
            return image_spec(checkpoint, *self.normal, height=side, width=side, resize="padded")
        tiles = tile_grid(request.image_size, side)
        known = [tuple(size) for size in checkpoint.config.get("image_grid_pinpoints") or ()]
        if known and request.image_size not in known:
            sizes = ", ".join(f"{h}×{w}" for h, w in known)
            raise UsageError(
                f"--image-size: this model was trained on {sizes} (image_grid_pinpoints), not on "
                f"{request.image_size[0]}×{request.image_size[1]}. Pass one of them, or none for a single picture."
            )
        self.check(checkpoint.config, tiles)
        return image_spec(
            checkpoint, *self.normal, height=side, width=side, resize="exact", resize_height=tiles[0] * side,
            resize_width=tiles[1] * side, tiles=tiles, overview="first",
        )  # fmt: skip

    def check(self, config: dict[str, Any], tiles: tuple[int, int]) -> None:
        """Raises UsageError for more tiles than the family keeps all tokens of."""

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> Any:
        from exporter.nn.projectors import RowProjector

        config = checkpoint.config
        return RowProjector(
            self.tower(config).hidden,
            self.decoder(checkpoint).hidden,
            str(config.get("projector_hidden_act", "gelu")),
            bool(config.get("multimodal_projector_bias", True)),
        )


def row_by_row(grid: tuple[int, int], tiles: tuple[int, int]) -> list[int]:
    """Places in the prompt of the whole image's tokens, those of each tile, and the row ends: the whole image comes first, then
    the rows of all tiles side by side, each with its end."""
    (rows, cols), (down, across) = grid, tiles
    whole, line = rows * cols, across * cols + 1
    tokens = [
        whole + (r * rows + i) * line + c * cols + j
        for r in range(down) for c in range(across) for i in range(rows) for j in range(cols)
    ]  # fmt: skip
    ends = [whole + row * line + line - 1 for row in range(down * rows)]
    return [*range(whole), *tokens, *ends]


def most_tiles(limit: str, tiles: tuple[int, int]) -> None:
    """Raises UsageError where "anyres_max_9" would shrink the tokens of so many tiles."""
    most = int(limit.removeprefix("anyres_max_"))
    if math.sqrt(tiles[0] * tiles[1] / most) > 1.1:
        raise UsageError(
            f"--image-size: {tiles[0]} × {tiles[1]} tiles; beyond about {int(1.21 * most)} this family shrinks the tokens "
            f"({limit}), which is not supported. Pass a smaller size."
        )
