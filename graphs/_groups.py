"""Groups of tokens known at trace time: windows of the raster, strips of it. Their sizes may differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphs._blocks import pick, placement
from graphs._contract import ReductionError, Site
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

ABSENT = -1e9
"""Below every snapped score: fills up groups that are smaller than the largest."""


def place_in_group(score: Tensor, groups: list[list[int]]) -> Tensor:
    """int64 [batch, n]: every token's place in the order of its group, best first, the earlier among equals.

    Args:
        score: snapped [batch, n]. groups: ascending places; together each of 0..n-1 once.
    """
    n, longest = score.shape[1], max(map(len, groups))
    padded = torch.cat([score, torch.full_like(score[:, :1], ABSENT)], 1)
    layout = [place for group in groups for place in [*group, *[n] * (longest - len(group))]]
    places = placement(pick(padded, layout).unflatten(1, (len(groups), longest)))
    where = {place: at for at, place in enumerate(layout)}
    return pick(places.flatten(1), [where[i] for i in range(n)])


def group_of(groups: list[list[int]]) -> list[int]:
    """The group of every token, in the order of the tokens."""
    owner = {place: g for g, group in enumerate(groups) for place in group}
    return [owner[i] for i in range(len(owner))]


def rows_of(site: Site, rows: int | None) -> int:
    """Rows of the raster: as given, or the site's.

    Raises:
        ReductionError: they do not divide the tokens, or the site's raster is lost.
    """
    if rows is None:
        if site.grid is None:
            raise ReductionError("it needs the raster of the tokens, which is lost here; give `rows` if there is one")
        return site.grid[0]
    if rows < 1 or site.tokens % rows:
        raise ReductionError(f"`rows` must divide the {site.tokens} tokens of a frame; found {rows}")
    return rows


def raster_of(site: Site, raster: tuple[int, ...] | None) -> tuple[int, int]:
    """Rows and columns of a frame: as given, or the site's.

    Raises:
        ReductionError: they do not make up a frame, or the site's raster is lost.
    """
    if raster is None:
        if site.grid is None:
            raise ReductionError("it needs the raster of the tokens, which is lost here; give `raster` if there is one")
        return site.grid
    if len(raster) != 2 or min(raster) < 1 or raster[0] * raster[1] != site.tokens:
        found = "+".join(map(str, raster))
        raise ReductionError(f"`raster` must be rows and columns of the {site.tokens} tokens of a frame; found {found}")
    return raster[0], raster[1]
