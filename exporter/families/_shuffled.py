"""Families whose projector takes the patches of a square side by side (pixel shuffle): what they share."""

from __future__ import annotations

from dataclasses import replace

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.families._contract import Geometry, Request, counted, site_of
from exporter.graphset import ImageSpec
from exporter.nn.specs import DecoderSpec, VitSpec
from graphs._contract import Site


def checked(spec: VitSpec) -> VitSpec:
    """Raises CheckpointError where the patches do not make whole squares."""
    if spec.side % spec.merge:
        raise CheckpointError(
            f"The tower's {spec.image}-pixel images are {spec.side} patches wide, the projector joins "
            f"{spec.merge} × {spec.merge} of them; expected a multiple of {spec.merge}."
        )
    return spec


def geometry(
    checkpoint: Checkpoint, request: Request, spec: VitSpec, decoder: DecoderSpec, image: ImageSpec, token: int,
    mark: str, written: str,
) -> Geometry:  # fmt: skip
    """One placeholder per tile; `hidden` is what the projector takes, so that reductions act before it."""
    tower = site_of(spec, decoder, request.frames * image.parts)
    inside: Site | str = replace(tower, signals=spec.in_tower_signals)
    if spec.merge > 1:
        inside = f"its projector joins {spec.merge}×{spec.merge} patches, so the tower cannot be shortened"
    return counted(checkpoint, decoder, image, tower, inside, token, mark=mark, written=written)
