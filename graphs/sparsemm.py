"""Give the heads that look at the image more of the cache, and fill each head's part with what the prompt's end looks at.

head_attention [batch, kv_heads, text, tokens], behind [batch, text] → int64 [batch, kv_heads, kept], -1 where a head has a
smaller part than the largest of its layer.

Every KV head of every layer has a capacity, known before anything runs:
1. Some tokens are reserved for each head, ⌊`reserved` · keep⌋ and at least one.
2. What is left of keep · heads · layers is shared out in proportion to the heads' scores, which have been measured once for
   the model: how often a head looks at the very place in the image that the answer is read from.
In a layer, for every KV head:
3. A token's score is the attention it gets from the last `window` tokens of the prompt, averaged and then pooled over its
   neighbours in raster order.
4. The tokens with the highest scores stay, as many as the head has room for, in raster order, with their positions.

Source: Wang et al. 2025, "SparseMM: Head Sparsity Emerges from Visual Concept Responses in MLLMs", arXiv:2506.05344.
Knobs:
    keep / keep_ratio: visual tokens that stay, the mean over all heads and layers.
    scores: JSON file with the heads' scores, {"layer-head": [scores, averaged], …} with the query heads of every layer, as
        published and as `edgetrim calibrate sparsemm` measures them on questions of yours; those that share keys are summed.
        Without it all heads have the same capacity.
    capacity_list: the capacities themselves, in place of all of the above: head by head, layer by layer.
    kv_heads: of a layer, by default the model's.
    reserved: the paper's 0.1.
    window: tokens at the prompt's end that are asked, text only.
    kernel: tokens pooled, an odd number. pool: how. The official code runs with averages of 5; its class offers 7 and max.
Differs: the official budget counts text as well, up to the window; here all text stays and the budget is about visual tokens.
Its rounded capacities add up to the budget only roughly, and one above the length of the prompt is lost; here the largest
remainders are rounded up, and what one head has no room for goes to the others. Its window holds the end of the image if
the text behind it is short. Equal scores go to the earlier token.
Position: *keep*, keys are rotated already.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import ascending, rank, snap
from graphs._contract import InCache, ReductionError, Signals, Site, Tier, keep_count
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("sparsemm:keep=48", "sparsemm:keep_ratio=0.25,kernel=7,pool=max,window=4")


@dataclass(frozen=True)
class SparseMM(InCache):
    """Divide the cache among heads by how much they see, and keep what the prompt's end looks at."""

    paper: ClassVar[str] = "Wang et al. 2025, arXiv:2506.05344"
    tier: ClassVar[Tier] = "exact"
    per_head: ClassVar[bool] = True

    keep: int | None = None
    keep_ratio: float | None = None
    scores: str | None = None
    capacity_list: tuple[int, ...] | None = None
    kv_heads: int | None = None
    reserved: float = 0.1
    window: int = 32
    kernel: int = 5
    pool: Literal["average", "max"] = "average"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("head_attention", "behind")

    def fit(self, site: Site) -> SparseMM:
        self.check()
        self.require(site)
        if not 0 <= self.reserved <= 1:
            raise ReductionError(f"`reserved` is the part shared out equally, in 0..1; found {self.reserved:g}")
        if self.window < 1:
            raise ReductionError(f"`window` must be at least 1; found {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ReductionError(f"`kernel` must be odd, so that a token is in the middle of it; found {self.kernel}")
        if self.kv_heads not in (None, site.kv_heads):
            raise ReductionError(f"`kv_heads` must be {site.kv_heads}, as the model has; found {self.kv_heads}")
        if self.capacity_list is not None:
            return self._given(self.capacity_list, site)
        keep = keep_count(self.keep, self.keep_ratio, site.total, what="visual tokens in the cache")
        fitted = replace(self, keep=keep, keep_ratio=None, kv_heads=site.kv_heads)
        if self.scores is None:
            return fitted
        heads = head_scores(Path(self.scores), site)
        least = max(1, math.floor(self.reserved * keep))
        return replace(fitted, scores=None, capacity_list=shared_out(heads, keep * len(heads), least, site.total))

    def _given(self, capacities: tuple[int, ...], site: Site) -> SparseMM:
        heads = site.kv_heads * site.depth
        if len(capacities) != heads:
            raise ReductionError(
                f"`capacity_list` needs {heads} counts, one for each of {site.kv_heads} KV heads of {site.depth} layers; found "
                f"{len(capacities)}"
            )
        if not 1 <= min(capacities) <= max(capacities) <= site.total:
            raise ReductionError(
                f"`capacity_list` must be in 1..{site.total}, as there are {site.total} visual tokens in the cache; found "
                f"{min(capacities)} to {max(capacities)}"
            )
        keep = math.floor(sum(capacities) / heads + 0.5)
        if self.scores is not None or self.keep_ratio is not None or self.keep not in (None, keep):
            raise ReductionError("`capacity_list` says it all; leave out `keep`, `keep_ratio` and `scores`")
        return replace(self, keep=keep, kv_heads=site.kv_heads)

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return replace(site, tokens=self.keep, frames=1, grid=None)

    @property
    def start(self) -> int:
        return 0

    def capacities(self, layer: int) -> tuple[int, ...]:
        """Visual tokens in the cache of every KV head of one layer (fitted method)."""
        assert self.keep is not None and self.kv_heads is not None
        if self.capacity_list is None:
            return (self.keep,) * self.kv_heads
        return self.capacity_list[layer * self.kv_heads : (layer + 1) * self.kv_heads]

    def kept(self, layer: int) -> int:
        return max(self.capacities(layer))

    def alike(self, layer: int) -> Hashable:
        return self.capacities(layer)

    def choose(self, layer: int, signals: Signals) -> Tensor:
        rows, behind = signals["head_attention"].float(), signals["behind"]
        asked = ((behind >= 0) & (behind < self.window)).to(torch.float32)
        mean = (asked[:, None, None] @ rows).squeeze(2) / asked.sum(1)[:, None, None]
        n, capacities = rows.shape[-1], self.capacities(layer)
        index = rank(snap(self._pooled(mean), 1 / n), max(capacities))
        if min(capacities) == max(capacities):
            return ascending(index)
        room = torch.arange(max(capacities)) < torch.tensor(capacities).unsqueeze(-1)
        index = ascending(torch.where(room, index, n))
        return torch.where(index == n, -1, index)

    def _pooled(self, x: Tensor) -> Tensor:
        """[..., tokens], each with its neighbours; beyond the ends are zeros."""
        beyond = [x[..., :1] * 0] * (self.kernel // 2)
        padded = torch.cat([*beyond, x, *beyond], -1)
        moved = torch.stack([padded[..., i : i + x.shape[-1]] for i in range(self.kernel)], -1)
        return moved.amax(-1) if self.pool == "max" else moved.mean(-1)


def head_scores(path: Path, site: Site) -> list[float]:
    """The scores of a file, of every KV head of every layer.

    Raises:
        ReductionError: the file cannot be read, or is not about such a model.
    """
    wanted = f'{{"layer-head": [scores]}} for {site.depth} layers and a multiple of {site.kv_heads} heads'
    try:
        read = {tuple(map(int, key.split("-"))): value for key, value in json.loads(path.read_text("utf-8")).items()}
        means = {key: math.fsum(value) / len(value) for key, value in read.items()}
    except OSError as e:
        raise ReductionError(f"`scores` {path} cannot be read: {e.strerror}") from e
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise ReductionError(f"`scores` {path} holds something else than {wanted} ({type(e).__name__}: {e})") from e
    heads, rest = divmod(len(means), site.depth)
    if (
        rest
        or not heads
        or heads % site.kv_heads
        or means.keys() != {(i, j) for i in range(site.depth) for j in range(heads)}
    ):
        raise ReductionError(f"`scores` {path} holds {len(means)} heads, expected {wanted}")
    if not all(math.isfinite(score) and score >= 0 for score in means.values()):
        raise ReductionError(f"`scores` {path} holds scores that are negative or no numbers")
    group = heads // site.kv_heads
    return [
        math.fsum(means[layer, head] for head in range(first, first + group))
        for layer in range(site.depth)
        for first in range(0, heads, group)
    ]


def shared_out(scores: Sequence[float], total: int, least: int, most: int) -> tuple[int, ...]:
    """Whole numbers in least..most that add up to `total`: `least` for each, the rest in proportion to the scores.

    What one has no room for goes to the others. The largest remainders are rounded up, of equals the earlier.

    >>> shared_out([3, 1, 0], 12, 1, 10), shared_out([8, 1, 1], 12, 1, 6)
    ((8, 3, 1), (6, 3, 3))
    """
    weights = [Fraction(score) for score in scores]
    full: set[int] = set()
    while True:
        rest = total - least * len(weights) - (most - least) * len(full)
        left = [i for i in range(len(weights)) if i not in full]
        whole = sum(weights[i] for i in left)
        part = {i: rest * weights[i] / whole if whole else Fraction(rest, len(left)) for i in left}
        over = {i for i in left if part[i] > most - least}
        if not over:
            break
        full |= over
    found = [most if i in full else least + math.floor(part[i]) for i in range(len(weights))]
    for i in sorted(left, key=lambda i: math.floor(part[i]) - part[i])[: total - sum(found)]:
        found[i] += 1
    return tuple(found)


METHOD = SparseMM
