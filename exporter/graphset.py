"""What export leaves behind: the graphs and everything a runtime must know to drive them. No torch here.

Roles, each an ONNX file (prefill and decode are one file when nothing is pruned inside the language model; question is
there only if a reduction compares patches with the question in CLIP's space):

======== ============================================================ ==============================================
role     inputs                                                       outputs
======== ============================================================ ==============================================
vision   pixel_values [batch, frames, 3, height, width]               the signals `reduce` and `prefill` ask for
question question_ids int64 [batch, question_tokens]                  aligned_text [batch, shared]
reduce   those signals; text, …, instruction_ids if guided; …         visual_embeds [batch, kept, hidden],
                                                                      index int64 [batch, kept]
prefill  inputs_embeds [batch, seq, hidden], position_ids, order       logits [batch, vocab], present_key_i,
                                                                      present_value_i, present_order_g, kept_l
decode   the same and past_key_i, past_value_i, past_order_g           logits, present_key_i, present_value_i,
                                                                      present_order_g
======== ============================================================ ==============================================

*Visual tokens come first in `inputs_embeds`, then the text, whatever the prompt's order*: `order` [batch, seq] holds each
token's place in the prompt and the attention mask is `order_kv <= order_q`, so the result is the same, and the visual
tokens are a static slice. Padding sits between the visual tokens and the text and has order `PAD`; the last token is
always real. `position_ids` [batch, seq] (or [3, batch, seq] with M-RoPE) feed the rotary embedding only.

Where tokens of an image see each other, or those of the prompt, the language model takes `reach` int64 [batch, seq] too: the order of
the last token that each one sees, which is its own where it looks back only. The mask is `order_kv <= reach_q` then.

Where the tower gives vectors for several decoder layers (DeepStack), they stand behind one another in `visual_embeds` and
`inputs_embeds` [batch, seq, (1 + planes) * hidden]; those of text are zero.

Where merged tokens shall count as many times as they have parts, `reduce` returns `visual_size` too, and the language
model takes `size` float32 [batch, seq] and `past_size_g` and returns `present_size_g`, as with `order`.

Where the cache is INT8, `past_key_i` and `past_value_i` are int8, and a KV group has `past_scale_g` [batch, rows, past, 1] too: a
float per token and head for the keys of its first layer, for the values of that, and so on (`exporter.nn.cache`).

Where a reduction goes on while decoding, prefill and decode also return `attention_row`, `shares`, `present_starts` (and
`wanted`, `present_state`), see `exporter.nn.cuts.Watch`; a graph `shorten_n` per bucket takes that row, `kept` and the
`past_*` of the last KV group, and returns them as `kept_now` and `present_*`.

Where a reduction inside the language model reads signals of the tower, `prefill` takes those too (`GraphSet.for_prefill`).

Layers that keep the same tokens form a *KV group*: they share a cache length and one `order` tensor.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

PAD = 2**31 - 1
"""`order` of padding: above every real token, so nothing attends to it."""

ROLES = ("vision", "question", "reduce", "prefill", "decode")
"""In the order in which they run. Behind them come those of `bucket_role`."""


def bucket_role(number: int) -> str:
    """Role of the graph that cuts the cache at the start of a bucket, from 0 on."""
    return f"shorten_{number + 1}"


def tokens_in_words(before: int, after: int) -> str:
    """A reduction as it is always said: both ways, since the field mixes them up.

    >>> tokens_in_words(576, 64)
    '576 → 64 tokens (11 % kept, 9.0× fewer)'
    """
    if after == 0:
        return f"{before} → 0 tokens"
    return f"{before} → {after} tokens ({100 * after / before:.0f} % kept, {before / after:.1f}× fewer)"


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes `pixel_values`: resize, cut into tiles or crop the centre, scale to 0..1, normalise. Sizes in pixels.

    height and width are those of a tile, where there are tiles.
    """

    height: int
    width: int
    resize: Literal["exact", "shortest_edge", "padded"]
    """"exact" resizes to (resize_height, resize_width), "padded" too, after a square was made of the image with the colour of the
    mean; "shortest_edge" scales the shorter side to resize_height."""
    resize_height: int
    resize_width: int
    resample: int
    """PIL's code: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tiles: tuple[int, int] = (1, 1)
    """Rows and columns of tiles that the resized image is cut into."""
    overview: Literal["none", "first", "last", "last, of the resized image"] = "none"
    """Where among its tiles the whole image stands, in a tile's size."""
    longest_edge: int = 0
    """A resize before the others, to this longest edge and the nearest even other one; 0: there is none."""

    @property
    def parts(self) -> int:
        """Pictures that an image becomes: its tiles, and the whole."""
        return self.tiles[0] * self.tiles[1] + (self.overview != "none")


@dataclass(frozen=True)
class VisualLayout:
    """Visual tokens in the prompt, and their positions.

    The prompt holds `placeholders` image tokens (one per frame for LLaVA-style families, one per clip for Qwen), each
    standing for `total // placeholders` visual tokens before reduction.
    """

    frames: int
    placeholders: int
    total: int
    """Visual tokens before any reduction, over all frames, fixed ones included."""
    kept: int
    """Visual tokens that enter the language model."""
    grid: tuple[int, int] | None
    """Rows and columns of one frame's tokens before reduction."""
    ids: list[list[int]]
    """[total // placeholders, axes]: position ids of one placeholder's tokens, relative to the placeholder's start. With one
    axis they say their order in the prompt, too."""
    span: int
    """How far one placeholder advances the positions of what follows it (unreduced)."""
    policy: Literal["keep", "compact"]
    readers: list[int] = field(default_factory=list)
    """Token ids that a runtime puts behind the last image token of a prompt."""
    media: Literal["image", "video"] = "image"
    """What a chat message calls what is seen."""
    mark: str = ""
    """What the chat template writes for an image or clip, where the prompt has something else there; else empty."""
    written: str = ""
    """What the prompt has there: image tokens, one per placeholder of that image or clip, and what stands around them."""
    template: str = ""
    """The chat template, where the checkpoint has none and its family another one than LLaVA-1.5's."""
    spliced: str = ""
    """What the template writes for an image token that is none of the tokenizer's: the text before and behind it is encoded apart, and
    the image token, an id of nothing, put between."""
    sees: Literal["before", "image", "prompt"] = "before"
    """What a token of the prompt sees: what is before it, for visual tokens all of their image too, or the whole prompt."""
    fixed: int = 0
    """Tokens that are no patches (row ends, class tokens): of a placeholder's tokens the last ones in `ids`, and never dropped before
    the language model."""

    @cached_property
    def id_rows(self) -> npt.NDArray[np.int64]:
        """`ids` [total // placeholders + 1, axes], with zeros behind them, for what is no patch: index -1."""
        axes = len(self.ids[0]) if self.ids else 1
        return np.array([*self.ids, [0] * axes], np.int64)

    def of_grid(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """An index [kept] of `reduce` without fixed tokens, so that it counts the tokens of all frames one after another."""
        each = self.total // self.placeholders
        holder, offset = np.divmod(np.maximum(index, 0), each)
        tokens: npt.NDArray[np.int64] = (index - holder * self.fixed)[offset < each - self.fixed]
        return tokens


@dataclass(frozen=True)
class TextSpec:
    """The language model's shapes, for a runtime that holds the cache and the embedding table."""

    hidden: int
    layers: int
    kv_heads: int
    head_dim: int
    vocab: int
    position_axes: int
    """1, or 3 with M-RoPE."""
    groups: list[int]
    """KV group of every layer."""
    kept: list[int]
    """Visual tokens in the cache of every KV group after prefill."""
    image_token: int
    eos: list[int]
    per_head: list[int] = field(default_factory=list)
    """KV groups whose heads keep tokens of their own: their order (and size) is [batch, kv_heads, past]."""
    planes: int = 0
    """How many more vectors stand behind each one of `inputs_embeds`, for the first layers (DeepStack); zeros for text."""

    longest: int = 0
    """Tokens of a conversation that there are positions for, visual ones as in the prompt; 0 where nothing ends."""
    window: int = 0
    """How many tokens the layer with the shortest sliding window looks back; 0 where all look back to the start."""

    @property
    def width(self) -> int:
        """Of `inputs_embeds` and `visual_embeds`."""
        return self.hidden * (1 + self.planes)


@dataclass(frozen=True)
class GraphSet:
    """The exported graphs of one model, one reduction, one precision."""

    family: str
    compute: Literal["fp32", "fp16"]
    weights: Literal["none", "int4", "int8", "fp8", "nvfp4"]
    files: dict[str, str]
    """role → file name, relative to the folder. All of `ROLES`, but question only where it is needed."""
    reductions: list[dict[str, Any]]
    """Fitted reductions in order: {"name", "place", "spec", knobs…}."""
    image: ImageSpec
    visual: VisualLayout
    text: TextSpec
    signals: dict[str, list[int]]
    """Outputs of `vision`, in order: name → shape without the batch axis. Inputs of `reduce`, but for those `for_prefill`."""
    side: dict[str, list[int | str]]
    """Further inputs of `reduce`, that do not come from `vision`: name → shape without the batch axis."""
    sized: bool
    """Whether `reduce` tells the tokens' sizes and the language model's attention counts them."""
    question_tokens: int = 0
    """Length of `question_ids`; 0 where there is no such graph."""
    buckets: list[list[int]] = field(default_factory=list)
    """Where the cache is cut while decoding: [answer tokens run, visual tokens that stay in its last KV group]."""
    state: int = 0
    """Width of `past_state`; 0 where there is none."""
    kv: Literal["none", "int8"] = "none"
    """Keys and values in the cache: floats, or integers and their scales."""
    guided: bool = False
    """Whether a reduction inside the language model keeps other tokens for another question."""
    for_prefill: list[str] = field(default_factory=list)
    """Those of `signals` that `prefill` takes, and not `reduce`."""
    plugged: dict[str, str] = field(default_factory=dict)
    """Graph file → the one that has plugins for full TensorRT in the place of some subgraphs. Everything else runs the first."""
    lookup: dict[str, str] = field(default_factory=dict)
    """Graph file with FP4 → the same for runtimes without that type, which looks its weights up in a table."""
    embedding: str = "embedding.npy"
    """File of the token embedding table [vocab, hidden], float16 or float32, memory-mapped."""

    @property
    def prefill_apart(self) -> bool:
        """Whether prefill is a graph of its own, as a reduction inside the language model or of its cache makes it."""
        return self.files["prefill"] != self.files["decode"]

    @property
    def images(self) -> int:
        """Images or clip frames of a sample, as they come; tiles are made of them later."""
        return self.visual.frames // self.image.parts

    @property
    def reaches(self) -> bool:
        """Whether some tokens see others behind them, so that the language model takes `reach`."""
        return self.visual.sees != "before"

    @property
    def reads_text(self) -> bool:
        """Whether `reduce` keeps other tokens for another question."""
        return bool(self.side.keys() & {"text", "text_mask", "aligned_text", "instruction_ids"})

    def cache(self) -> dict[str, tuple[int, tuple[int | None, ...]]]:
        """What a conversation holds of every token: `past_*` input of the decode graph → its KV group, and its shape behind the batch
        axis, where None is the axis of tokens."""
        text, found = self.text, dict[str, tuple[int, tuple[int | None, ...]]]()
        for layer, group in enumerate(text.groups):
            for kind in ("key", "value"):
                found[f"past_{kind}_{layer}"] = group, (text.kv_heads, None, text.head_dim)
        for group in range(len(text.kept)):
            if self.kv == "int8":
                found[f"past_scale_{group}"] = group, (2 * text.groups.count(group) * text.kv_heads, None, 1)
            for kind in ("order", "size") if self.sized else ("order",):
                heads = (text.kv_heads,) if group in text.per_head else ()
                found[f"past_{kind}_{group}"] = group, (*heads, None)
        return found

    def roles(self) -> dict[str, tuple[str, ...]]:
        """File name → the roles it plays, both in the order in which they run."""
        present = [role for role in (*ROLES, *map(bucket_role, range(len(self.buckets)))) if role in self.files]
        return {
            file: tuple(role for role in present if self.files[role] == file)
            for file in dict.fromkeys(self.files[role] for role in present)
        }

    def save(self, folder: Path) -> None:
        (folder / "graphs.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> GraphSet:
        """Read what `save` wrote. Raises VerificationError: it is not that."""
        from exporter._typed import read_json, typed
        from exporter.errors import VerificationError

        try:
            found = typed(cls, read_json(folder / "graphs.json"))
            found._check()
        except (OSError, ValueError) as e:
            raise VerificationError(f"{folder}/graphs.json cannot be read ({e}). Run export again.") from e
        return found

    def _check(self) -> None:
        """What no single entry can tell. Raises ValueError."""
        for name in [*self.files.values(), *self.plugged.values(), *self.lookup.values(), self.embedding]:
            if Path(name).name != name or "\\" in name or "\0" in name:
                raise ValueError(f"it names a file outside the folder: {name!r}")
        if missing := [role for role in ROLES if role not in self.files and role != "question"]:
            raise ValueError(f"it names no graph for {' and '.join(missing)}")
        for entry in self.reductions:
            if not all(isinstance(entry.get(k), str) for k in ("name", "place", "spec")):
                raise ValueError("a reduction has no name, place or spec")
            if not all(isinstance(entry.get(k), int) for k in ("before", "after")):
                raise ValueError(f"{entry['name']} does not say how many tokens there are before and after it")
        if min(self.visual.placeholders, self.visual.frames, self.image.height, self.image.width, self.image.parts) < 1:
            raise ValueError("it counts no images, or none that have pixels")
        if len(self.text.groups) != self.text.layers or not set(self.text.groups) <= set(range(len(self.text.kept))):
            raise ValueError("text.groups has to name one of text.kept for each layer")
