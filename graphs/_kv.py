"""What reductions of the cache share: from which layer on they act, and how many tokens stay there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from graphs._contract import InCache, R, ReductionError, Site, keep_count


@dataclass(frozen=True)
class FromLayer(InCache):
    """An `InCache` method that keeps `keep` visual tokens in the cache of decoder layer `layer` and of all behind it.

    `paper_layer`: of the published method; `paper_ratio`: what stays if nothing is said about it.
    """

    paper_layer: ClassVar[int] = 0
    paper_ratio: ClassVar[float]

    layer: int | None = None
    keep: int | None = None
    keep_ratio: float | None = None

    def fit(self: R, site: Site) -> R:
        assert isinstance(self, FromLayer)
        self.check()
        layer = min(self.paper_layer, site.depth - 1) if self.layer is None else self.layer
        if not 0 <= layer < site.depth:
            raise ReductionError(
                f"`layer` must be in 0..{site.depth - 1}, as the model has {site.depth} decoder layers; found {layer}"
            )
        ratio = self.paper_ratio if self.keep is None and self.keep_ratio is None else self.keep_ratio
        keep = keep_count(self.keep, ratio, site.total, what="visual tokens in the cache")
        fitted = replace(self, layer=layer, keep=keep, keep_ratio=None)
        fitted.require(site)
        return fitted

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return replace(site, tokens=self.keep, frames=1, grid=None)

    @property
    def start(self) -> int:
        assert self.layer is not None
        return self.layer

    def kept(self, layer: int) -> int:
        assert self.keep is not None
        return self.keep
