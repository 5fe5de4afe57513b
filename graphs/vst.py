"""Summarise the visual tokens window by window in trained tokens, and keep only these in the cache.

keys, values of the visual tokens [batch, kv_heads, tokens, head_dim] → of the summaries [batch, kv_heads, kept, head_dim].

1. The visual tokens go in windows of `window`, the last one shorter. Behind every `ratio` of them stands a visual summarisation
   token: one trained embedding, with trained projections to queries, keys and values in every layer.
2. A window sees the text in front of the image, the summaries of the windows before it, and itself, each token what stands before it.
   Text behind the image sees summaries only.
3. No layer's cache holds a visual token: of the image, the summaries stay.

So prefill grows with the number of windows, and the image is compressed by the language model itself.

Source: Shu et al. 2024, "Video-XL: Extra-Long Vision Language Model for Hour-Scale Video Understanding", arXiv:2409.14485, in the
layout and with the settings of its official code (interleaved, full coverage, seeing the summaries before, no sink).
Knobs:
    weights: the published checkpoint, or its tensors `model.beacon_embed_tokens.weight` and
        `model.layers.N.self_attn.beacon_{q,k,v}_proj.…` alone.
    ratio: visual tokens per summary; published weights take 2, 4 and 8, those of images 12 and 16 as well. window: 1440 in the paper, ten
        frames of 144 tokens.
Differs: the paper draws the ratio of every window at random where several are configured, here all have the same. Its cache holds
keys without rotation and turns them anew in every step; here a summary's key is turned twice in prefill, for its own window
and for all that follows, which is the same as text counts on from the summaries. `ratio` has to divide `window`. Its 2 × 2 pooling to 144
tokens per frame is `avgpool` here. Video-XL-Pro and Video-XL-2: `videoxl`.
Position: *compact*: in its window a token's position counts the text in front, the summaries before and the window; what
follows the image counts the text in front and the summaries.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

from graphs._contract import ReductionError, Site, Summarizing, Tier

EXAMPLES = ("vst:weights=vst.safetensors", "vst:weights=vst.safetensors,ratio=2,window=16")
SWEEP = "vst:weights=vst.safetensors"


@dataclass(frozen=True)
class Vst(Summarizing):
    """Video-XL's visual summarisation tokens."""

    paper: ClassVar[str] = "Shu et al. 2024, arXiv:2409.14485"
    tier: ClassVar[Tier] = "trained"
    prefixes: ClassVar[tuple[str, ...]] = ("", "model.")

    weights: str
    ratio: int = 8
    window: int = 1440
    window_list: tuple[int, ...] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("keys",)

    @property
    def every(self) -> int:
        return self.ratio

    @property
    def windows(self) -> tuple[int, ...]:
        assert self.window_list is not None
        return self.window_list

    def fit(self, site: Site) -> Vst:
        self.check()
        if self.ratio < 2 or self.window < 1 or self.window % self.ratio:
            raise ReductionError(
                f"`ratio` must be 2 or more and divide `window`; found ratio {self.ratio} and window {self.window}"
            )
        if site.grid_positions:
            raise ReductionError("its summaries count positions anew, and t/h/w positions cannot be")
        full, rest = divmod(site.total, self.window)
        if rest and rest < self.ratio:
            raise ReductionError(
                f"of {site.total} visual tokens the last window would hold {rest}, too few for a summary of {self.ratio}; take a "
                "smaller `ratio`, or another `window`"
            )
        self.require(site)
        return replace(self, window_list=(self.window,) * full + ((rest,) if rest else ()))

    def after(self, site: Site) -> Site:
        return replace(site, tokens=self.kept(0), frames=1, grid=None)

    @property
    def embedding(self) -> str:
        return "beacon_embed_tokens.weight"

    def projections(self, layer: int) -> tuple[str, str, str]:
        q, k, v = (f"layers.{layer}.self_attn.beacon_{part}_proj" for part in "qkv")
        return q, k, v

    def trained(self, site: Site) -> dict[str, tuple[int, ...]]:
        made: dict[str, tuple[int, ...]] = {self.embedding: (1, site.llm_dim)}
        widths = [heads * site.head_dim for heads in (site.heads, site.kv_heads, site.kv_heads)]
        for layer in range(site.depth):
            for name, width in zip(self.projections(layer), widths, strict=True):
                made[f"{name}.weight"] = (width, site.llm_dim)
                if site.qkv_bias:
                    made[f"{name}.bias"] = (width,)
        return made

    def strange(self, names: Collection[str]) -> str | None:
        more = sorted(
            {name.split(".")[-2] for name in names if ".beacon_" in name}
            - {"beacon_q_proj", "beacon_k_proj", "beacon_v_proj"}
        )
        if more:
            return f"its summaries have further projections of their own ({', '.join(more)}), which Video-XL's do not"
        return None


METHOD = Vst
