"""The shapes of towers and decoders, and which signals they can give: all that planning needs. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """The shape of a transformer block, of images or of text.

    `layer_scale`: what attention and MLP add is multiplied by learned factors. `qk_norm`: RMS norm of queries and keys, all
    heads as one. `rms_norm`: RMS norms instead of layer norms.
    """

    hidden: int
    intermediate: int
    heads: int
    eps: float
    activation: str
    qkv_bias: bool = True
    layer_scale: bool = False
    qk_norm: bool = False
    rms_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class VitSpec(BlockSpec):
    """`cls`: a class token at 0. `pre_norm`: CLIP's norm before the first block; `post_norm`: one of the features. `layers`:
    blocks the tower has; `blocks`: those up to the features, which are the output of block `blocks - 1`. `merge`: a visual
    token is `merge` × `merge` patches, side by side in its vector (pixel shuffle), or, `pooled`, their mean; 1: a patch."""

    blocks: int
    patch: int
    image: int
    cls: bool
    pre_norm: bool
    patch_bias: bool
    layers: int
    post_norm: bool = False
    merge: int = 1
    pooled: bool = False

    @property
    def side(self) -> int:
        """Patches along an edge of the image."""
        return self.image // self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        return self.side // self.merge, self.side // self.merge

    @property
    def dim(self) -> int:
        """Width of a visual token."""
        return self.hidden if self.pooled else self.hidden * self.merge**2

    @property
    def signals(self) -> frozenset[str]:
        """What the tower can supply to a reduction behind it, at the features' block and at any other."""
        any_block = {"hidden", "keys", "joint_keys", "column_attention"}
        if self.cls:
            any_block |= {"cls_attention", "cls_keys", "joint_cls_attention"}
        if self.cls and self.merge == 1:
            any_block |= {"cls"}
        patches = {f"patches@{b}" for b in range(self.blocks)} if self.merge == 1 else set()
        return frozenset(any_block | patches | {f"{s}@{b}" for s in any_block for b in range(self.layers)})

    @property
    def in_tower_signals(self) -> frozenset[str]:
        """What there is inside every block."""
        found = {"hidden", "size", "keys", "attention", "column_attention", "value_norm"}
        return frozenset(found | ({"cls", "cls_attention"} if self.cls else set()))


@dataclass(frozen=True)
class Fixed:
    """Tokens that go to the language model whatever a reduction before it keeps: the learned vectors that end rows (the projector's
    `image_newline`), or the class tokens of the frames. `tokens`: those of a placeholder that reductions see; `count`: fixed ones."""

    placeholders: int
    tokens: int
    count: int
    class_tokens: bool = False


@dataclass(frozen=True, kw_only=True)
class ClipTextSpec(BlockSpec):
    """`tokens`: length of a question, padded. `shared`: width of the space shared with images. `eos`: end-of-text token,
    or `EARLY_EOS`."""

    layers: int
    vocab: int
    tokens: int
    shared: int
    eos: int


@dataclass(frozen=True)
class QwenVitSpec:
    """Qwen2.5-VL's tower, and what makes others another (its facts are the defaults).

    `patches`: rows and columns of patches. `window` in pixels; 0: there are none. `full`: blocks with full attention. `gated`: the
    MLP has a gate. `layer_norm`: layer norms instead of RMS norms. `table`: rows of the learned positions, a square that is
    stretched over the patches; 0: there are none. `planes`: blocks whose output goes to the language model, too (DeepStack).
    """

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    patch: int
    temporal_patch: int
    merge: int
    window: int
    full: tuple[int, ...]
    out: int
    activation: str
    patches: tuple[int, int]
    gated: bool = True
    layer_norm: bool = False
    patch_bias: bool = False
    table: int = 0
    planes: tuple[int, ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of merged tokens."""
        return self.patches[0] // self.merge, self.patches[1] // self.merge

    @cached_property
    def windows(self) -> Index:
        """[windows, slots] merged-token raster index of every slot; -1 pads windows cut by the border."""
        rows, cols = self.grid
        if not self.window:
            return np.arange(rows * cols)[None]
        side = self.window // self.merge // self.patch
        cells = np.full((-(-rows // side) * side, -(-cols // side) * side), -1, dtype=np.int64)
        cells[:rows, :cols] = np.arange(rows * cols).reshape(rows, cols)
        tiles = cells.reshape(cells.shape[0] // side, side, cells.shape[1] // side, side)
        flat = tiles.transpose(0, 2, 1, 3).reshape(-1, side * side)
        spare = (flat < 0).sum(1).min()
        order = np.argsort(flat < 0, axis=1, kind="stable")
        return np.take_along_axis(flat, order, 1)[:, : side * side - spare]

    @cached_property
    def slots(self) -> Index:
        """[windows * slots * merge²] patch (merge order: the merge² patches of a token are neighbours), -1 for padding."""
        unit = self.merge**2
        patches = self.windows.reshape(-1, 1) * unit + np.arange(unit)
        return np.where(self.windows.reshape(-1, 1) >= 0, patches, -1).reshape(-1)

    @property
    def padded(self) -> bool:
        """Whether any window is cut by the border."""
        return bool((self.slots < 0).any())

    @cached_property
    def angles(self) -> npt.NDArray[np.float32]:
        """[slots, head_dim / 2] rotary angle of every slot: half the frequencies follow the row, half the column."""
        quarter = self.hidden // self.heads // 4
        inv_freq = 10000.0 ** -(np.arange(quarter, dtype=np.float32) / quarter)
        return (self.places[..., None] * inv_freq).reshape(len(self.places), -1).astype(np.float32)

    @cached_property
    def places(self) -> Index:
        """[slots, 2] row and column of every slot's patch."""
        rows, cols = self.grid
        row, col, in_row, in_col = np.meshgrid(
            np.arange(rows), np.arange(cols), np.arange(self.merge), np.arange(self.merge), indexing="ij"
        )
        place = np.stack([row * self.merge + in_row, col * self.merge + in_col], -1).reshape(-1, 2)
        return place[np.maximum(self.slots, 0)]

    @cached_property
    def stretched(self) -> tuple[Index, npt.NDArray[np.float32]]:
        """[slots, 4] rows of the table of learned positions and their weights: bilinear, corner on corner."""
        side = round(self.table**0.5)
        last = np.maximum(np.array(self.patches) - 1, 1)
        at = self.places.astype(np.float32) * np.float32(side - 1) / last.astype(np.float32)
        low = np.floor(at).astype(np.int64)
        high, share = np.minimum(low + 1, side - 1), (at - low).astype(np.float32)
        rows, cols = (np.stack([low[:, i], high[:, i]], 1) for i in (0, 1))
        by_row, by_col = (np.stack([1 - share[:, i], share[:, i]], 1) for i in (0, 1))
        taps = rows[:, :, None] * side + cols[:, None, :]
        return taps.reshape(-1, 4), (by_row[:, :, None] * by_col[:, None, :]).reshape(-1, 4)

    @cached_property
    def raster(self) -> Index:
        """[tokens] slot of every merged token, in raster order."""
        flat = self.windows.reshape(-1)
        where = np.empty(self.grid[0] * self.grid[1], dtype=np.int64)
        where[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
        return where

    @property
    def signals(self) -> frozenset[str]:
        """Patches and keys of any block; attention columns of full-attention blocks only (a window's column is not global)."""
        keys = {f"{s}@{b}" for s in ("patches", "keys", "joint_keys") for b in range(self.blocks)}
        columns = {f"column_attention@{b}" for b in self.full}
        return frozenset({"hidden", "keys", "joint_keys", "column_attention"} | keys | columns)


@dataclass(frozen=True, kw_only=True)
class PixtralSpec(BlockSpec):
    """A tower with rotary positions on a static grid. `patches`: rows and columns of patches; `merge`: as in `VitSpec`."""

    blocks: int
    layers: int
    patch: int
    merge: int
    patches: tuple[int, int]
    theta: float = 10000.0
    cls: bool = False
    pooled: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        return self.patches[0] // self.merge, self.patches[1] // self.merge

    @property
    def dim(self) -> int:
        """Width of a visual token."""
        return self.hidden * self.merge**2

    @cached_property
    def angles(self) -> npt.NDArray[np.float32]:
        """[patches, head_dim / 2] rotary angle: even frequencies follow the row, odd ones the column."""
        head_dim = self.hidden // self.heads
        inv_freq = (1.0 / self.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(np.float32)
        row, col = (place.reshape(-1, 1).astype(np.float32) for place in np.indices(self.patches))
        return np.concatenate([row * inv_freq[0::2], col * inv_freq[1::2]], 1)

    @property
    def signals(self) -> frozenset[str]:
        """Of the features' block, and of any up to there."""
        any_block = {"hidden", "keys", "joint_keys", "column_attention"}
        return frozenset(any_block | {f"{s}@{b}" for s in any_block for b in range(self.blocks)})


@dataclass(frozen=True, kw_only=True)
class FastVitSpec:
    """A tower of convolutions. Per stage: its width, its blocks, how much wider its MLPs are, and whether its blocks attend. `size`: height
    and width of an image; every stage but the first halves the raster, and the stem quarters it."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    ratios: tuple[int, ...]
    attends: tuple[bool, ...]
    size: tuple[int, int]
    head_dim: int = 32
    cls: bool = False
    merge: int = 1
    pooled: bool = False

    @property
    def step(self) -> int:
        """Pixels along an edge of a visual token."""
        return 2 ** (len(self.widths) + 1)

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // self.step, self.size[1] // self.step

    @property
    def dim(self) -> int:
        """Width of a visual token."""
        return 2 * self.widths[-1]

    @property
    def blocks(self) -> int:
        """Of the last stage, whose raster is that of the visual tokens."""
        return self.depths[-1]

    @property
    def signals(self) -> frozenset[str]:
        attention = {"keys", "joint_keys", "column_attention"}
        return frozenset({"hidden"} | attention | {f"{s}@{b}" for s in attention for b in range(self.blocks)})


IN_LLM_SIGNALS = frozenset(
    "hidden size previous embeds all_embeds places text_hidden text_embeds text_mask instruction_mask attention_row plain_row next_row "
    "next_plain_row last_scores last_log_attention text_attention head_attention visual_attention plain_text_attention "
    "plain_head_attention plain_visual_attention rope_response keys next_keys next_plain_queries next_plain_keys".split()
)
"""What a reduction inside the language model can look at, see `graphs._contract`."""

HANDED = ("patches", "cls_attention", "joint_cls_attention", "column_attention")
"""Signals of a tower block that it can look at, too."""

IN_CACHE_SIGNALS = frozenset(
    "keys received head_attention text_attention attention_row text_mask instruction_mask behind".split()
)
"""What a reduction of the cache can look at."""


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """What there is to know of a language model from outside.

    planes: the vector of a visual token is followed by so many more, each added to what leaves one of the first layers
    (DeepStack). reach: some tokens see others behind them, so masks are made from `reach`, not from `order`.
    scaled_embeddings: text embeddings are multiplied by sqrt(hidden); what comes from an image is not.
    windows: per layer, the sliding window in tokens or None.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    windows: tuple[int | None, ...]
    planes: int = 0
    reach: bool = False
    scaled_embeddings: bool = False

    @property
    def width(self) -> int:
        """Of `inputs_embeds`: a token's vector and its planes."""
        return self.hidden * (1 + self.planes)

    @property
    def longest(self) -> int:
        """Tokens that it has positions for; 0 where nothing ends."""
        return 0

    @property
    def window(self) -> int:
        """How many tokens the layer with the shortest sliding window looks back; 0 where all look back to the start."""
        return min((window for window in self.windows if window is not None), default=0)

    @property
    def embed_scale(self) -> float:
        return self.hidden**0.5 if self.scaled_embeddings else 1.0


@dataclass(frozen=True, kw_only=True)
class DecoderSpec(DecoderShape):
    """The decoder's shape, and what makes it another than Llama's (whose facts are the defaults).

    inv_freq: head_dim / 2 rotary frequencies; `rope_scale` multiplies cos and sin. local_inv_freq: those of layers with a
    window; empty where they are the same. mrope_section: how many frequencies follow the t, h, w position, or None.
    attention_scale: multiplies queries.
    attention_cap, logit_cap: scores and logits are bent by tanh to stay below; None: they are not.
    qk_norm: RMS norm of queries and keys, per head and before the rotation. post_norms: norms also behind attention and MLP.
    norm_offset: what has to be added to the norm weights of a checkpoint. mrope_interleaved: the frequencies of t, h and w take
    turns, instead of standing in three blocks.
    positions: rows of a learned table that is added to what enters the first layer, `first_position` the row of position 0; inv_freq
    is empty then, and renumbering positions inside the language model changes nothing. layer_norms: norms take the mean away and have
    a bias. gated: whether the MLP has a gate; one without has biases.
    """

    eps: float
    activation: str
    qkv_bias: bool
    output_bias: bool
    inv_freq: tuple[float, ...]
    rope_scale: float
    mrope_section: tuple[int, ...] | None
    attention_scale: float
    local_inv_freq: tuple[float, ...] = ()
    attention_cap: float | None = None
    logit_cap: float | None = None
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    mrope_interleaved: bool = False
    positions: int = 0
    first_position: int = 0
    layer_norms: bool = False
    gated: bool = True

    @property
    def longest(self) -> int:
        return self.positions - self.first_position

    @property
    def rotary_axes(self) -> tuple[int, ...]:
        """Which of the t, h and w positions every frequency follows; empty where there is one position."""
        if self.mrope_section is None:
            return ()
        if not self.mrope_interleaved:
            return tuple(axis for axis, count in enumerate(self.mrope_section) for _ in range(count))
        return tuple(i % 3 if i < 3 * self.mrope_section[i % 3] else 0 for i in range(len(self.inv_freq)))

    def frequencies(self, layer: int) -> tuple[float, ...]:
        """Rotary frequencies of one layer."""
        return self.inv_freq if self.windows[layer] is None else self.local_inv_freq or self.inv_freq
