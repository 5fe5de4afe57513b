"""Let a trained token behind the prompt glimpse at the image, and keep what it found, in the cache of every layer.

hidden [batch, tokens, dim], scores of the glimpse [batch, heads, tokens], patches of some tower blocks [batch, tokens,
patch_dim] → tokens [batch, keep, dim]; index int64 [batch, keep].

1. A glimpse token stands behind the prompt. Its embedding, and what is added to it before every further layer, are
   norm(linear(e_i)) with learnt e_i. It sees the whole prompt; nothing sees it.
2. In decoder layer `layer` it looks at every visual token: one score per head (`scores`).
3. A small transformer on the grid turns them into one logit per token: a linear layer from heads to 256; for each tower block
   of `block_list` an attention layer whose queries and keys see that block's patches too (projected to 512), with rotary
   positions of row and column, and a gated MLP; a linear layer to the logit.
4. The best `keep` stay, in raster order, in the layers behind `layer` and in the cache of all of them. The glimpse token goes.

Source: Zeng et al. 2025, "A Glimpse to Compress: Dynamic Visual Token Pruning for Large Vision-Language Models",
arXiv:2508.01548.
Knobs:
    weights: safetensors file with the published tensors, matrices turned to [in, out]. From the published new_modules_gp.pt:
            new = torch.load("new_modules_gp.pt", weights_only=True)
            flat = {f"{m}.{n}": t for m in ("attn_fuser", "le_proj", "le_norm") for n, t in new[m].items()} | {"learnable_embeddings": new["learnable_embeddings"]}
            save_file({n: (t.t() if t.ndim == 2 else t).float().contiguous() for n, t in flat.items()}, "glimpse.safetensors")
    keep / keep_ratio: visual tokens that stay; the paper's cap `max_remain_ratio`, 0.111 in its tables.
    layer: default the published one: 21 of 32 layers, 26 of 40, 18 of 28, 23 of 36.
    scores: log_softmax over the whole prompt, or the scaled logits; as the weights were trained: the published ones for Llama
        take log_softmax, those for Qwen logits.
    block_list: tower blocks, in the order of the fuser's layers; default the published ones: the last and every quarter
        before it (22, 16, 10, 4 of CLIP-L up to its features, 31, 23, 15, 7 of 32). rows: of the grid; the image's.
Differs: the paper keeps tokens with a probability above 0.5, at most its cap: a count that depends on the image. Here it is always
the cap. Equal logits go to the earlier token. One image; it needs the whole grid, so nothing may act before it.
Position: *keep*: kept tokens keep their ids, as the cache of the layers before holds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import select, snap, take
from graphs._contract import Probing, Reduced, ReductionError, Signals, Site, Tier, keep_count
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("glimpse:weights=glimpse.safetensors,keep_ratio=0.111",)
SWEEP = "glimpse:weights=glimpse.safetensors,keep_ratio={ratio}"
WIDTH, CONDITION, HEADS, EPS = 256, 512, 4, 1e-6
"""Of the published fuser: its width, that of the projected patches, attention heads, epsilon of the norms."""
SIGNALS = {"log_softmax": "last_log_attention", "logits": "last_scores"}


@dataclass(frozen=True)
class Glimpse(Probing):
    """Keep what a trained token looks at."""

    paper: ClassVar[str] = "Zeng et al. 2025, arXiv:2508.01548"
    tier: ClassVar[Tier] = "trained"

    weights: str
    keep: int | None = None
    keep_ratio: float | None = None
    layer: int | None = None
    scores: Literal["log_softmax", "logits"] = "log_softmax"
    block_list: tuple[int, ...] | None = None
    rows: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return SIGNALS[self.scores], *(f"patches@{block}" for block in self.block_list or ())

    @property
    def layers(self) -> tuple[int, ...]:
        assert self.layer is not None
        return (self.layer + 1,)

    def fit(self, site: Site) -> Glimpse:
        self.check()
        offered = [s for s in site.signals if s.startswith("patches@")]
        if site.grid is None or site.frames > 1 or not offered:
            raise ReductionError(
                "it needs the whole grid of one image, and patches of tower blocks (`patches@…`): nothing may act before it, and "
                f"one frame at a time; found {site.tokens} tokens in {site.frames} frame(s), "
                f"grid {'lost' if site.grid is None else '{}×{}'.format(*site.grid)}, {len(offered)} blocks"
            )
        layer = (2 * site.depth - 1) // 3 if self.layer is None else self.layer
        if not 0 <= layer < site.depth - 1:
            raise ReductionError(
                f"`layer` must be in 0..{site.depth - 2}, as the model has {site.depth} decoder layers and tokens leave behind "
                f"it; found {layer}"
            )
        if self.block_list is not None and len({*self.block_list}) < len(self.block_list):
            raise ReductionError(
                f"`block_list` must name every block once; found {'+'.join(map(str, self.block_list))}"
            )
        last = max(int(name.partition("@")[2]) for name in offered)
        fitted = replace(
            self,
            keep=keep_count(self.keep, self.keep_ratio, site.total),
            keep_ratio=None,
            layer=layer,
            block_list=self.block_list or tuple(range(last, -1, -(last // 4 + 1))),
            rows=site.grid[0] if self.rows is None else self.rows,
            position=self.resolved_position(site),
        )
        if fitted.position != "keep":
            raise ReductionError("`position` must be keep: the cache of earlier layers holds the tokens at their ids")
        if fitted.rows is None or fitted.rows < 1 or site.tokens % fitted.rows:
            raise ReductionError(f"`rows` must divide {site.tokens} tokens; found {fitted.rows}")
        fitted.require(site)
        return fitted

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return replace(site, tokens=self.keep, grid=None)

    def kept(self, layer: int) -> int:
        assert self.keep is not None
        return self.keep

    def trained(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert self.block_list is not None
        both = WIDTH + CONDITION
        shapes: dict[str, tuple[int, ...]] = {
            "learnable_embeddings": (site.depth, 1, site.llm_dim),
            **_linear("le_proj", site.llm_dim, site.llm_dim),
            "le_norm.weight": (site.llm_dim,),
            **_linear("attn_fuser.attn_in_proj", site.heads, WIDTH),
            **_linear(f"attn_fuser.attn_out_projs.{len(self.block_list) - 1}", WIDTH, 1),
        }
        for n in range(len(self.block_list)):
            at = f"attn_fuser.layers.{n}"
            shapes |= _linear(f"attn_fuser.cond_in_projs.{n}", site.patch_dim, CONDITION)
            shapes |= {f"{at}.{norm}.weight": (WIDTH,) for norm in ("norm1", "norm2")}
            shapes |= {f"{at}.attn.{p}_proj.weight": (both, both) for p in "qk"}
            shapes |= {f"{at}.attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "vo"}
            shapes |= _linear(f"{at}.mlp.gate_proj", WIDTH, 2 * WIDTH) | _linear(f"{at}.mlp.up_proj", WIDTH, 2 * WIDTH)
            shapes |= _linear(f"{at}.mlp.down_proj", 2 * WIDTH, WIDTH)
        return shapes

    def probe(self, signals: Signals, eps: float) -> Tensor:
        assert self.layer is not None
        rows = signals["learnable_embeddings"][: self.layer + 1, 0]
        return _norm(_project(rows, signals, "le_proj"), signals["le_norm.weight"], eps)

    def forward(self, layer: int, signals: Signals) -> Reduced:
        index = select(snap(self.logits(signals)), self.kept(layer))
        return Reduced(take(signals["hidden"], index), index)

    def logits(self, signals: Signals) -> Tensor:
        """float32 [batch, tokens]"""
        blocks = self.block_list or ()
        x = _project(signals[SIGNALS[self.scores]].transpose(1, 2), signals, "attn_fuser.attn_in_proj")
        cos, sin = self._rotary(x.shape[1])
        for n, block in enumerate(blocks):
            at = f"attn_fuser.layers.{n}"
            patches = signals[f"patches@{block}"].flatten(1, 2).float()
            patches = _project(patches, signals, f"attn_fuser.cond_in_projs.{n}")
            normed = _norm(x, signals[f"{at}.norm1.weight"], EPS)
            seen = torch.cat([normed, patches], -1)
            q, k = (_rotate(_heads(_project(seen, signals, f"{at}.attn.{p}_proj")), cos, sin) for p in "qk")
            v = _heads(_project(normed, signals, f"{at}.attn.v_proj"))
            rows = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1)
            x = x + _project((rows @ v).transpose(1, 2).flatten(2), signals, f"{at}.attn.o_proj")
            normed = _norm(x, signals[f"{at}.norm2.weight"], EPS)
            gate, up = (_project(normed, signals, f"{at}.mlp.{p}_proj") for p in ("gate", "up"))
            x = x + _project(gate * torch.sigmoid(gate) * up, signals, f"{at}.mlp.down_proj")
        return _project(x, signals, f"attn_fuser.attn_out_projs.{len(blocks) - 1}")[..., 0]

    def _rotary(self, tokens: int) -> Sequence[Tensor]:
        """cos and sin [tokens, head_dim / 2]: a quarter of the head follows the row, a quarter the column."""
        assert self.rows is not None
        pairs = (WIDTH + CONDITION) // HEADS // 4
        inverse = [10000.0 ** (-i / pairs) for i in range(pairs)]
        places = (divmod(token, tokens // self.rows) for token in range(tokens))
        angles = [[place * frequency for place in both for frequency in inverse] for both in places]
        return torch.tensor([[*map(math.cos, a)] for a in angles]), torch.tensor([[*map(math.sin, a)] for a in angles])


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}


def _project(x: Tensor, signals: Signals, name: str) -> Tensor:
    x = x @ signals[f"{name}.weight"]
    return x + signals[f"{name}.bias"] if f"{name}.bias" in signals else x


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _heads(x: Tensor) -> Tensor:
    """[batch, tokens, dim] → [batch, heads, tokens, dim / heads]"""
    apart: Tensor = x.unflatten(-1, (HEADS, -1))
    return apart.transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


METHOD = Glimpse
