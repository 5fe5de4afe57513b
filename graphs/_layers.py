"""What reductions inside the language model share: the layers at which they act, and how many tokens stay there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from graphs._contract import InLLM, R, ReductionError, Site, keep_count

DEPTH = 32
"""Decoder layers of the language models that the papers' layers are meant for."""

WHAT = "visual tokens in the language model"


def layers_of(site: Site, knob: str, given: tuple[int, ...] | None, paper: tuple[int, ...]) -> tuple[int, ...]:
    """The layers before which tokens are dropped: as given, or the paper's ones of 32, moved to this depth.

    >>> layers_of(Site(1, depth=28), "layer_list", None, (8, 16, 24))
    (7, 14, 21)

    Raises:
        ReductionError: they are not ascending, or there are no such layers.
    """
    last = site.depth - 1
    if given is None:
        if last < len(paper):
            raise ReductionError(
                f"it acts at {len(paper)} layers behind the first, so the model needs at least {len(paper) + 1}; "
                f"found {site.depth}"
            )
        layers: list[int] = []
        for i, layer in enumerate(paper):
            near = math.floor(layer * site.depth / DEPTH + 0.5)
            layers.append(min(max(near, layers[-1] + 1 if layers else 1), last - (len(paper) - 1 - i)))
        return tuple(layers)
    if list(given) != sorted(set(given)) or not 1 <= given[0] <= given[-1] <= last:
        wanted = "ascending and " if len(given) > 1 else ""
        found = "+".join(map(str, given))
        raise ReductionError(
            f"`{knob}` must be {wanted}in 1..{last}, as the model has {site.depth} decoder layers and the first one "
            f"needs all tokens; found {found}"
        )
    return given


def counts_of(site: Site, keep: int, papers: Sequence[tuple[float, ...]]) -> tuple[int, ...]:
    """Tokens left after every stage, `keep` after the last, in the proportions of the paper's list with the nearest last
    count: with a for log(count / all), stage i has a_i / a_last as there.

    >>> counts_of(Site(576), 72, [(288, 144, 72)]), counts_of(Site(576), 144, [(288, 144, 72)])
    ((288, 144, 72), (363, 229, 144))
    """
    n = site.total
    paper = min(papers, key=lambda counts: abs(counts[-1] - keep))
    if paper[-1] == n:
        return (keep,) * len(paper)
    parts = [math.log(count / n) / math.log(paper[-1] / n) for count in paper]
    return tuple(math.floor(n * (keep / n) ** part + 0.5) for part in parts)


@dataclass(frozen=True)
class AtLayer(InLLM):
    """An `InLLM` method that acts once, before `layer`. `paper_layer`: of 32. `paper_ratio`: what stays, if nothing is
    said about it."""

    paper_layer: ClassVar[int]
    paper_ratio: ClassVar[float]

    layer: int | None = None
    keep: int | None = None
    keep_ratio: float | None = None

    def fit(self: R, site: Site) -> R:
        assert isinstance(self, AtLayer)
        self.check()
        given = None if self.layer is None else (self.layer,)
        (layer,) = layers_of(site, "layer", given, (self.paper_layer,))
        ratio = self.paper_ratio if self.keep is None and self.keep_ratio is None else self.keep_ratio
        keep = keep_count(self.keep, ratio, site.total, what=WHAT)
        fitted = replace(self, layer=layer, keep=keep, keep_ratio=None, position=self.resolved_position(site))
        fitted.require(site)
        return fitted

    @property
    def layers(self) -> tuple[int, ...]:
        assert self.layer is not None
        return (self.layer,)

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return replace(site, tokens=self.keep, frames=1, grid=None)

    def kept(self, layer: int) -> int:
        assert self.keep is not None and layer == self.layer
        return self.keep


@dataclass(frozen=True)
class Staged(InLLM):
    """An `InLLM` method that acts before several layers: `keep_list` tokens are left after each, `keep` after the last.

    Subclasses resolve `layer_list` and say what counts the paper would have; `resolve` does the rest.
    """

    layer_list: tuple[int, ...] | None = None
    keep_list: tuple[int, ...] | None = None
    keep: int | None = None
    keep_ratio: float | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        assert self.layer_list is not None
        return self.layer_list

    def last(self, site: Site) -> int | None:
        """The count asked for after the last stage, None: the paper's."""
        if self.keep is None and self.keep_ratio is None:
            return None
        return keep_count(self.keep, self.keep_ratio, site.total, what=WHAT)

    def resolve(self: R, site: Site, layers: tuple[int, ...], counts: tuple[int, ...]) -> R:
        """This method at `layers`, with its own `keep_list`, or else with `counts`, one for each layer."""
        assert isinstance(self, Staged)
        if self.keep_list is not None:
            counts = self.keep_list
            found = "+".join(map(str, counts))
            if len(counts) != len(layers):
                raise ReductionError(f"`keep_list` needs {len(layers)} counts, one for each layer; found {found}")
            if list(counts) != sorted(counts, reverse=True) or not 1 <= counts[-1] <= counts[0] <= site.total:
                raise ReductionError(
                    f"`keep_list` must descend within 1..{site.total}, as there are {site.total} {WHAT}; found {found}"
                )
            if self.last(site) not in (None, counts[-1]) or self.keep_ratio is not None:
                raise ReductionError(f"`keep_list` = {found} says it all; leave out `keep` and `keep_ratio`")
        fitted = replace(
            self,
            layer_list=layers,
            keep_list=counts,
            keep=counts[-1],
            keep_ratio=None,
            position=self.resolved_position(site),
        )
        fitted.require(site)
        return fitted

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return replace(site, tokens=self.keep, frames=1, grid=None)

    def kept(self, layer: int) -> int:
        assert self.keep_list is not None
        return self.keep_list[self.layers.index(layer)]
