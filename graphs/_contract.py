"""What a reduction is.

A reduction is a frozen dataclass whose fields are its knobs. It acts at one of five places:

* `BeforeLLM`: once, on the visual tokens between tower and language model (`PerFrame` when frames are
  independent, `PerClip` when they share one budget).
* `InTower`: in tower blocks, between attention and MLP (`PerFrameInTower` when frames are independent).
* `Compressor` (`graphs._compressor`): instead of the projector between tower and language model.
* `InLLM`: before chosen decoder layers, during prefill; while decoding too, if it says when.
* `InCache`: on the keys and values that chosen decoder layers leave in the cache, at the end of prefill; `Summarizing` puts
  those of trained tokens there.

`fit` resolves the knobs against a `Site` (static counts and the signals there are) before anything is traced.
`forward` is plain torch with static shapes: run eagerly it is the reference, traced it is the subgraph.
A method asks for *signals* by name and never learns which family supplies them.

Signals, all with leading axes [batch, frames, tokens] unless said otherwise. `name@7` means tower block 7 instead of
the block that produces the features; blocks behind that one can be asked for too (not of `patches`).

=================== ================================ =====================================================
before the LLM      shape                            meaning
=================== ================================ =====================================================
hidden              [batch, frames, tokens, dim]     patch (or merged) tokens at the site, no CLS
patches@7           [batch, frames, tokens, patch_dim] what tower block 7 returns, mean over a token's patches, no CLS
cls                 [batch, frames, dim]             CLS token at the same layer as `hidden`
cls_attention       [batch, frames, tokens]          attention of CLS to each token, mean over heads
column_attention    [batch, frames, tokens]          attention each token receives, mean (heads, queries)
keys                [batch, frames, tokens, head_dim] keys, mean over heads
cls_keys            [batch, frames, head_dim]        key of CLS, mean over heads
joint_keys          [batch, frames, tokens, dim]     keys, heads side by side
joint_cls_attention [batch, frames, tokens]          attention of CLS with all heads as one vector, scale 1/√dim
aligned             [batch, frames, tokens, shared]  tokens in the space that a CLIP tower shares with its text
aligned_text        [batch, shared]                  the question in that space
text                [batch, text, dim]               embeddings of the prompt's text tokens (LLM width)
text_mask           [batch, text]                    1 for real text tokens, 0 for padding
instruction_ids     int64 [batch, 128]               the question in the tokens of a Q-Former's own tokenizer, padded
instruction_mask    int64 [batch, 128]               1 for its real tokens, 0 for padding
warp                int64 [batch, frames, tokens]    where a token was in the frame before, -1 if out of sight
=================== ================================ =====================================================

=================== ================================ =====================================================
in the tower        shape, tokens counting CLS       meaning, at the block in question
=================== ================================ =====================================================
hidden              [batch, frames, tokens, dim]     tokens between attention and MLP
size                [batch, frames, tokens]          float32: how many tokens each one stands for
keys                [batch, frames, tokens, head_dim] keys, mean over heads
attention           [batch, frames, tokens, tokens]  attention, mean over heads; rows are queries
cls_attention       [batch, frames, tokens]          its row of CLS
column_attention    [batch, frames, tokens]          its mean over queries
value_norm          [batch, frames, tokens]          length of the values, all heads
=================== ================================ =====================================================

=================== ================================ =====================================================
in the LLM          shape, before layer l            meaning; text includes padding
=================== ================================ =====================================================
hidden              [batch, tokens, dim]             visual tokens as they enter layer l
size                [batch, tokens]                  float32: how many tokens each one stands for
previous            [batch, tokens, dim]             the same tokens as they entered layer l - 1
embeds              [batch, tokens, dim]             the same tokens as they entered layer 0
all_embeds          [batch, entered, dim]            all visual tokens as they entered layer 0, also those gone since
places              int64 [batch, tokens]            which of those each one is
text_hidden         [batch, text, dim]               text tokens as they enter layer l
text_embeds         [batch, text, dim]               text tokens as they entered layer 0
text_mask           [batch, text]                    1 for real text tokens, 0 for padding
instruction_mask    [batch, text]                    1 for text behind the image
attention_row       [batch, tokens]                  last token's attention in layer l - 1, mean over heads
plain_row           [batch, tokens]                  the same without RoPE or window, softmax over visual tokens only
next_row            [batch, tokens]                  attention_row as layer l itself would have it
next_plain_row      [batch, tokens]                  next_row without RoPE
last_scores         [batch, heads, tokens]           its scores before mask and softmax, by head
last_log_attention  [batch, heads, tokens]           logarithm of its attention, by head
text_attention      [batch, text, tokens]            attention of each text token in layer l - 1, mean over heads
head_attention      [batch, heads, text, tokens]     the same by head
visual_attention    [batch, tokens, tokens]          attention among visual tokens in layer l - 1, mean over heads
plain_…             alike                            text_, head_ and visual_attention without RoPE
rope_response       [batch, text, tokens]            what RoPE alone gives in layer l - 1: its factor for queries and keys of
                                                     ones, 1 where both stand at one place
keys                [batch, kv_heads, tokens, head_dim] of layer l - 1, with RoPE
next_plain_queries  [batch, heads, tokens, head_dim] as layer l would project them, before RoPE
next_plain_keys     [batch, kv_heads, tokens, head_dim] as layer l would project them, before RoPE
next_keys           [batch, kv_heads, tokens, head_dim] the same with RoPE
patches@7           [batch, frames, tokens, patch_dim] as before the LLM, of all tokens that entered; so are the attentions of a
                                                     named block
=================== ================================ =====================================================

=================== ================================ =====================================================
in the cache        shape, behind layer l            meaning; heads: mean over those that share the keys
=================== ================================ =====================================================
keys                [batch, kv_heads, tokens, head_dim] of layer l, with RoPE
received            [batch, kv_heads, tokens]        attention a token receives, sum over the prompt's tokens
head_attention      [batch, kv_heads, text, tokens]  attention of each text token
text_attention      [batch, text, tokens]            the same, mean over all heads
attention_row       [batch, tokens]                  last token's attention, mean over all heads
text_mask           [batch, text]                    1 for real text tokens, 0 for padding
instruction_mask    [batch, text]                    1 for text behind the image
behind              int64 [batch, text]              tokens behind it in the prompt, 0 for the last one, -1 for padding
=================== ================================ =====================================================

=================== ================================ =====================================================
while decoding      shape                            meaning
=================== ================================ =====================================================
attention_row       [batch, present]                 newest token's attention to the visual tokens in the cache
shares              [batch, 4]                       its attention to system text, image, instruction, answer
state               [batch, state]                   what `WhileDecoding.wanted` returned one token ago, 0 at first
=================== ================================ =====================================================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, TypeVar, get_type_hints

from graphs._knobs import accepts, expected

if TYPE_CHECKING:
    from torch import Tensor

Signals = Mapping[str, "Tensor"]
OF_PROMPT = frozenset({"text", "text_mask", "aligned_text", "instruction_ids", "instruction_mask"})
"""Signals without a frames axis: they come from the prompt, not from the tower."""

INSTRUCTION_TOKENS = 128
"""Length of `instruction_ids`: a longer question loses its tail, as where InstructBLIP was trained (max_txt_len)."""

Space = Literal["tower", "llm"]
Tier = Literal["exact", "fixed budget", "trained", "control"]
R = TypeVar("R", bound="Reduction")


class ReductionError(ValueError):
    """The knobs do not fit this model or these shapes. The message says what was found and what would fit."""


@dataclass(frozen=True)
class Site:
    """The visual tokens at one place of one model, as far as they are known before tracing.

    tokens: per frame, without CLS. frames: images or clip frames in one sample (after temporal merging of the
        tower).
    grid: rows and columns of `tokens` in raster order, or None once the raster is lost.
    depth: tower blocks up to the features (InTower, BeforeLLM) or decoder layers (InLLM).
    signals: names that can be supplied. grid_positions: positions are t/h/w triplets, not a count.
    dim, patch_dim, llm_dim: width of `hidden` and `patches` in the tower, and of the language model; 0 where unknown.
    heads, kv_heads, head_dim: of a decoder layer (InLLM, InCache); 0 elsewhere. qkv_bias: whether its projections have biases.
    class_tokens: the language model gets the class token of every frame, whatever a reduction keeps.
    """

    tokens: int
    frames: int = 1
    grid: tuple[int, int] | None = None
    signals: frozenset[str] = frozenset()
    depth: int = 0
    grid_positions: bool = False
    dim: int = 0
    patch_dim: int = 0
    llm_dim: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    qkv_bias: bool = False
    class_tokens: bool = False

    @property
    def total(self) -> int:
        """Visual tokens over all frames."""
        return self.tokens * self.frames


class Reduced(NamedTuple):
    """What a reduction returns.

    tokens: [batch, kept, dim].
    index: int64 [batch, kept], position of each kept token (of a merged one: its anchor) among the tokens
        that came in, frames flattened; -1 for a token that is no patch (CLS).
    size: float32 [batch, kept] or None, how many tokens each one stands for.
    """

    tokens: Tensor
    index: Tensor  # type: ignore[assignment]
    size: Tensor | None = None


@dataclass(frozen=True)
class Reduction(ABC):
    """Base of all places. Subclasses are frozen dataclasses; fields are knobs, as in the paper."""

    place: ClassVar[str]
    tier: ClassVar[Tier] = "control"
    """How the static token count relates to the published method's. "exact": it has the same. "fixed budget": its count
    depends on the data, ours is fixed. "trained": it needs weights of its own. "control": nothing is published."""
    paper: ClassVar[str]
    """Where the method comes from: authors, year, arXiv id. Shown by `edgetrim list reductions`."""
    prefixes: ClassVar[tuple[str, ...]] = ("",)
    """What may stand before the names of `trained` in a file with weights."""

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """Signals `forward` reads, with the knobs as they are."""

    @abstractmethod
    def fit(self: R, site: Site) -> R:
        """The same method with every knob resolved for this site. Raises ReductionError."""

    @abstractmethod
    def after(self, site: Site) -> Site:
        """The site behind this (fitted) method: its token counts, and the signals that still make sense."""

    @property
    def merges(self) -> bool:
        """Whether kept tokens are changed by those that go; False: each is one of the tokens that came in."""
        return False

    def check(self) -> None:
        """Refuse knob values that are not of their annotated type. Every `fit` does this first.

        Raises:
            ReductionError: names the knob, what was found and what it takes.
        """
        hints = _hints(type(self))
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            if not accepts(hints[name], value):
                raise ReductionError(f"`{name}` takes {expected(hints[name])}; found {value!r}")

    def require(self, site: Site) -> None:
        """Refuse a site that cannot supply a needed signal. `patches` of unknown width are none."""
        offered = {s for s in site.signals if site.patch_dim or not s.startswith("patches@")}
        missing = [s for s in self.needs if s not in offered]
        if missing:
            plain = sorted({s.partition("@")[0] for s in offered})
            raise ReductionError(
                f"it needs {', '.join(f'`{s}`' for s in missing)}, but this model offers only "
                f"{', '.join(f'`{s}`' for s in plain) or 'nothing'} there"
            )

    def trained(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Trained tensors, name (identifiers, joined by dots) → shape: `forward` finds them among its signals. They come
        from the safetensors file or checkpoint folder that the method's knob `weights` names, and lie there as here."""
        return {}

    def strange(self, names: Collection[str]) -> str | None:
        """Why a file that holds tensors of these names is another model's, though all that `trained` asks for may be there; None
        where it is not."""
        return None

    def knobs(self) -> dict[str, object]:
        """Knob names and values, in the order of definition."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@cache
def _hints(kind: type[Reduction]) -> dict[str, object]:
    return get_type_hints(kind)


def keep_count(keep: int | None, keep_ratio: float | None, tokens: int, *, what: str = "tokens per image") -> int:
    """The number of tokens to keep from `keep` (a count) or `keep_ratio` (a fraction, rounded half up).

    Raises:
        ReductionError: neither or both given, or the count is outside 1..tokens.
    """
    if (keep is None) == (keep_ratio is None):
        raise ReductionError("give exactly one of `keep` (a count) and `keep_ratio` (a fraction that stays)")
    if keep is None:
        assert keep_ratio is not None
        if not 0 < keep_ratio <= 1:
            raise ReductionError(f"`keep_ratio` is the fraction that stays, in (0, 1]; found {keep_ratio:g}")
        keep = max(1, math.floor(keep_ratio * tokens + 0.5))
    if not 1 <= keep <= tokens:
        raise ReductionError(f"`keep` must be in 1..{tokens}, as there are {tokens} {what}; found {keep}")
    return keep


def block_of(site: Site, signal: str, share: float) -> int:
    """The tower block nearest to `share` of the depth (0: first, 1: the features' block) that offers `signal`.

    So a paper's "block 8 of 23" finds its counterpart in a tower of another depth, or one where only some blocks
    attend to all tokens. Equally near: the earlier.

    Raises:
        ReductionError: no block offers it.
    """
    blocks = [int(b) for name, _, b in (s.partition("@") for s in site.signals) if name == signal and b]
    blocks = sorted(b for b in blocks if b < site.depth)
    if not blocks:
        raise ReductionError(f"it needs `{signal}` of a block inside the tower, which this model does not offer")
    return min(blocks, key=lambda b: abs(b - share * (site.depth - 1)))


Position = Literal["auto", "keep", "compact"]


@dataclass(frozen=True)
class BeforeLLM(Reduction):
    """Acts once on all visual tokens of a sample, between the tower and the language model.

    `space` says on which side of the projector: "tower" (tower width, fewer tokens to project) or "llm".
    `position` is the policy for the ids of the kept tokens: "keep" their original ids (holes stay; for grid
    positions the t/h/w triplet) or "compact" (renumbered 0..kept-1). "auto" is the paper's choice, and "keep"
    on a grid.
    """

    place: ClassVar[str] = "before_llm"
    paper_position: ClassVar[Literal["keep", "compact"]] = "keep"
    position: Position = field(default="auto", kw_only=True)

    @property
    def space(self) -> Space:
        return "tower"

    def resolved_position(self, site: Site) -> Literal["keep", "compact"]:
        if self.position != "auto":
            return self.position
        return "keep" if site.grid_positions else self.paper_position

    @property
    def passes_cls(self) -> bool:
        """Whether CLS is among the tokens that stay."""
        return False

    @property
    def sized(self) -> bool:
        """Whether the language model shall add log(size) of a kept token to its attention logits."""
        return False

    @abstractmethod
    def forward(self, signals: Signals) -> Reduced:
        """Reduce. `signals` holds what `needs` names, with the frames axis."""


@dataclass(frozen=True)
class PerFrame(BeforeLLM):
    """A `BeforeLLM` method that treats every frame (image, tile) alone: `keep` counts tokens per frame.

    Subclasses write `reduce_frame`, where signals have no frames axis.
    """

    keep: int | None = None
    keep_ratio: float | None = None

    def fit(self: R, site: Site) -> R:
        assert isinstance(self, PerFrame)
        self.check()
        keep = keep_count(self.keep, self.keep_ratio, self.capacity(site))
        fitted = replace(self, keep=keep, keep_ratio=None, position=self.resolved_position(site))
        fitted.require(site)
        return fitted

    def capacity(self, site: Site) -> int:
        """The most tokens a frame can yield: its patches, and CLS for methods that pass it on."""
        return site.tokens

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return replace(site, tokens=self.keep, grid=None, signals=site.signals & {"hidden", "cls", *OF_PROMPT})

    def forward(self, signals: Signals) -> Reduced:
        hidden = signals["hidden"]
        frames, tokens = hidden.shape[1:3]
        out = self.reduce_frame(by_frame(signals, self.needs, frames))
        kept = out.index.shape[1]
        index = out.index.reshape(-1, frames, kept)
        offset = (_arange(frames) * tokens)[None, :, None]
        index = _where(index >= 0, index + offset, index)
        size = None if out.size is None else out.size.reshape(-1, frames * kept)
        return Reduced(out.tokens.reshape(-1, frames * kept, hidden.shape[-1]), index.flatten(1), size)

    @abstractmethod
    def reduce_frame(self, signals: Signals) -> Reduced:
        """Reduce one frame: leading axes [batch * frames, tokens]; signals of the prompt are repeated per frame."""


@dataclass(frozen=True)
class PerClip(BeforeLLM):
    """A `BeforeLLM` method with one budget for the whole clip: `keep` counts tokens over all frames."""

    keep: int | None = None
    keep_ratio: float | None = None

    def fit(self: R, site: Site) -> R:
        assert isinstance(self, PerClip)
        self.check()
        keep = keep_count(self.keep, self.keep_ratio, site.total, what=f"tokens in {site.frames} frames")
        fitted = replace(self, keep=keep, keep_ratio=None, position=self.resolved_position(site))
        fitted.require(site)
        return fitted

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return replace(site, tokens=self.keep, frames=1, grid=None, signals=site.signals & {"hidden", *OF_PROMPT})


@dataclass(frozen=True)
class InTower(Reduction):
    """Acts in tower blocks, between attention and MLP, and so shortens the tower itself.

    The token axis includes CLS at 0 if the tower has one. In the blocks behind, log(size) of a key is added to its
    attention logits, if the method is `proportional`.
    """

    place: ClassVar[str] = "in_tower"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"
    position: Position = field(default="auto", kw_only=True)

    @property
    def proportional(self) -> bool:
        """Whether attention in later blocks counts a merged token as many times as it has parts."""
        return self.merges

    @property
    @abstractmethod
    def blocks(self) -> tuple[int, ...]:
        """Tower blocks (0-based) it acts in, ascending (fitted method)."""

    @abstractmethod
    def forward(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        """One block's reduction; called for the blocks in `blocks` only.

        Args:
            signals: what `needs` names, and always hidden and size.
            cls_tokens: 1 if CLS is at place 0, else 0.
        Returns:
            tokens [batch, frames, kept, dim]; index int64 [batch, frames, kept] into this block's tokens, CLS included,
            frames one after another; size float32 [batch, frames, kept].
        """

    def resolved_position(self) -> Literal["keep", "compact"]:
        return self.paper_position if self.position == "auto" else self.position


@dataclass(frozen=True)
class PerFrameInTower(InTower):
    """An `InTower` method that treats every frame alone. Subclasses write `reduce_frame`, with frames in the batch."""

    def forward(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        frames, tokens = signals["hidden"].shape[1:3]
        out = self.reduce_frame(block, {k: v.flatten(0, 1) for k, v in signals.items()}, cls_tokens)
        assert out.size is not None
        x, index, size = (t.unflatten(0, (-1, frames)) for t in (out.tokens, out.index, out.size))
        return Reduced(x, index + (_arange(frames) * tokens)[None, :, None], size)

    @abstractmethod
    def reduce_frame(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        """One block's reduction of one frame: signals with leading axes [batch * frames, tokens]; `index` and `size`
        [batch * frames, kept]."""


@dataclass(frozen=True)
class InLLM(Reduction):
    """Acts during prefill, before the decoder layers in `layers`; earlier layers, and their cache, hold all tokens.

    `position`: kept tokens keep their ids in later layers ("keep"), or everything is renumbered without gaps there
    ("compact"). `everywhere`: what it drops leaves the cache of earlier layers, too, from `since` on.
    """

    place: ClassVar[str] = "in_llm"
    everywhere: ClassVar[bool] = False
    paper_position: ClassVar[Literal["keep", "compact"]] = "keep"
    position: Position = field(default="auto", kw_only=True)

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Decoder layers (0-based, at least 1) before which tokens are dropped, ascending (fitted method)."""

    @property
    def since(self) -> int:
        """The first decoder layer whose cache holds what is left at last, where that is so `everywhere` (fitted method)."""
        return 0

    @property
    def sized(self) -> bool:
        """Whether later layers shall add log(size) of a merged token to its attention logits."""
        return False

    @property
    def of_tower(self) -> tuple[str, ...]:
        """Those of `needs` that come from the tower."""
        return tuple(name for name in self.needs if "@" in name)

    @abstractmethod
    def kept(self, layer: int) -> int:
        """Visual tokens that enter `layer`, one of `layers` (fitted method). May be 0."""

    @abstractmethod
    def forward(self, layer: int, signals: Signals) -> Reduced:
        """One layer's reduction.

        Args:
            signals: what `needs` names, and always hidden and size, of the visual tokens still present; the trained tensors.
        Returns:
            tokens [batch, kept, dim]; index int64 [batch, kept] into the tokens present, ascending; size or None, which
            leaves sizes as they are.
        """

    def resolved_position(self, site: Site) -> Literal["keep", "compact"]:
        """Raises ReductionError where t/h/w positions cannot be renumbered."""
        if site.grid_positions:
            if self.position == "compact":
                raise ReductionError("`position` must be keep: t/h/w positions cannot be renumbered inside the LLM")
            return "keep"
        return self.paper_position if self.position == "auto" else self.position


@dataclass(frozen=True)
class Skipping(InLLM):
    """An `InLLM` method that drops nothing: the visual tokens that `forward` leaves out of a layer skip it, and go on.

    So every layer's cache holds the tokens that took part in it. What leaves a layer is h + w · MLP(h) for those that took
    part (h: behind attention), w · x for those that skipped it, with a weight w for each.
    """

    @abstractmethod
    def weight(self, layer: int, signals: Signals) -> Tensor:
        """float32 [batch, tokens], of all visual tokens.

        Args:
            signals: hidden, and the trained tensors.
        """


@dataclass(frozen=True)
class Probing(InLLM):
    """An `InLLM` method that acts at one layer and sends a token of its own there, the *probe*, to look at the prompt.

    The probe stands one place behind the prompt, so that it sees all of it and nothing sees the probe; to the signals it is
    the last token. It goes when the tokens go. Those leave the cache of all layers, not only of the later ones.
    """

    everywhere: ClassVar[bool] = True

    @abstractmethod
    def probe(self, signals: Signals, eps: float) -> Tensor:
        """float32 [layers, dim]: what is added to the probe, zero at first, as it enters each layer before the method's.

        Args:
            signals: the trained tensors. eps: of the decoder's norms.
        """


@dataclass(frozen=True)
class WhileDecoding(InLLM):
    """An `InLLM` method that acts at one layer, and goes on dropping there while the answer is written.

    The cache of that layer and of all behind it shrinks in `buckets`, so that each length has an engine's shape. What it
    looks at is the attention of the layer before, whose cache holds every visual token.
    """

    @property
    @abstractmethod
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """(answer tokens run, visual tokens that stay from then on), ascending and descending (fitted method)."""

    @property
    def state(self) -> int:
        """Width of what a predictor remembers from token to token."""
        return 0

    @property
    def predicts(self) -> bool:
        """Whether `wanted` is there; else only the number of tokens decides."""
        return False

    @abstractmethod
    def shorten(self, attention_row: Tensor, keep: int) -> Tensor:
        """int64 [batch, keep], ascending: which of the visual tokens present stay.

        Args:
            attention_row: float32 [batch, present].
        """

    @abstractmethod
    def wanted(self, signals: Signals, visual: int) -> tuple[Tensor, Tensor | None]:
        """What the next token needs, asked of methods that predict: visual tokens int64 [batch], and the new state if any.

        Args:
            signals: shares, state if there is one, and the trained tensors, all float32. visual: tokens before the layer.
        """


@dataclass(frozen=True)
class InCache(Reduction):
    """Shortens the cache that prefill leaves in decoder layer `start` and all behind it: prefill itself sees all tokens,
    decoding fewer. Text always stays.

    Every layer chooses for itself, or the first one for all (`shared`). A KV head may have its own choice (`per_head`).
    Kept tokens stay at their positions.
    """

    place: ClassVar[str] = "in_cache"
    shared: ClassVar[bool] = False
    per_head: ClassVar[bool] = False

    @property
    @abstractmethod
    def start(self) -> int:
        """The first decoder layer (0-based) whose cache is shortened (fitted method)."""

    @property
    def readers(self) -> tuple[int, ...]:
        """Token ids that the runtime puts behind the image. If there are any, no other text sees the image."""
        return ()

    @abstractmethod
    def kept(self, layer: int) -> int:
        """Visual tokens that stay in the cache of `layer`; the same for all layers if `shared`."""

    def alike(self, layer: int) -> Hashable:
        """Layers for which this is equal choose by the same rule, and are traced once: by default those that keep as many."""
        return self.kept(layer)

    @abstractmethod
    def choose(self, layer: int, signals: Signals) -> Tensor:
        """int64 [batch, kept], or [batch, kv_heads, kept] if `per_head`: the visual tokens that stay, ascending.

        With -1 for slots that a head leaves empty; those come last.

        Args:
            signals: what `needs` names.
        """

    def merge(self, keys: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The kept keys and values; overridden where those that go change them (then `merges` is True as well).

        Args:
            keys, values: [batch, kv_heads, tokens, head_dim], of the visual tokens. index: [batch, kv_heads, kept].
        Returns:
            Both [batch, kv_heads, kept, head_dim].
        """
        return take_per_head(keys, index), take_per_head(values, index)


@dataclass(frozen=True)
class Summarizing(InCache):
    """An `InCache` method that keeps tokens of its own, *summaries*, instead of the visual ones.

    The visual tokens are cut into windows. Behind every `every` tokens of a window stands a summary: one trained embedding, and in
    every layer trained projections to queries, keys and values; all else is the layer's. A window sees the text in front of the
    image, the summaries of the windows before, and itself; text behind the image sees summaries only. In its own window a
    summary has the position at which it stands there; to everything behind it the position that it has where there are but
    summaries. So that is how the cache holds them, and from there text counts on.
    """

    shared: ClassVar[bool] = True

    @property
    @abstractmethod
    def every(self) -> int:
        """Visual tokens per summary (fitted method)."""

    @property
    @abstractmethod
    def windows(self) -> tuple[int, ...]:
        """Visual tokens of every window, each at least `every` (fitted method)."""

    @property
    @abstractmethod
    def embedding(self) -> str:
        """Which of the trained tensors is the embedding [1, dim]."""

    @abstractmethod
    def projections(self, layer: int) -> tuple[str, str, str]:
        """Names of the linear layers of queries, keys and values; their weights [out, in] are among the trained tensors."""

    @property
    def start(self) -> int:
        return 0

    @property
    def merges(self) -> bool:
        return True

    @property
    def summaries(self) -> tuple[int, ...]:
        """Of every window."""
        return tuple(tokens // self.every for tokens in self.windows)

    def kept(self, layer: int) -> int:
        return sum(self.summaries)

    @property
    def anchors(self) -> list[int]:
        """For every summary, the visual token that it stands behind."""
        starts = [sum(self.windows[:n]) for n in range(len(self.windows))]
        pairs = zip(starts, self.summaries, strict=True)
        return [start + self.every * (n + 1) - 1 for start, count in pairs for n in range(count)]

    def choose(self, layer: int, signals: Signals) -> Tensor:
        from graphs._blocks import spread

        return spread(self.anchors, signals[self.needs[0]]).long()


def take_per_head(x: Tensor, index: Tensor) -> Tensor:
    """Gather along axis 2, per sample and head: x [batch, heads, n, dim], index int64 [batch, heads, k] (-1: token 0)."""
    from graphs._blocks import take

    found: Tensor = take(x.flatten(0, 1), index.clamp(min=0).flatten(0, 1)).unflatten(0, (-1, x.shape[1]))
    return found


def _arange(n: int) -> Tensor:
    from graphs._torch import torch

    return torch.arange(n)


def by_frame(signals: Signals, needs: Collection[str], frames: int) -> dict[str, Tensor]:
    """Signals [batch, frames, ...] → [batch * frames, ...]. Those of the prompt are repeated for each frame; what is not
    among `needs`, trained tensors, stays as it is."""
    prompt = {k: v.unsqueeze(1).expand(-1, frames, *v.shape[1:]) for k, v in signals.items() if k in OF_PROMPT}
    return {k: v.flatten(0, 1) if k in needs else v for k, v in {**signals, **prompt}.items()}


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    from graphs._torch import torch

    return torch.where(condition, a, b)
