"""From prompts to what the language-model graphs take: text ids, position ids and order. Pure numpy.

The graphs want the visual tokens first and the text behind them, whatever the prompt's order (see
`exporter.graphset`), with padding between the two. What the prompt's order was is told by `order`, for the causal mask,
and by `position_ids`, for the rotary embedding. Both follow the layout's policy:

* "keep": every kept token has the place and position it had in the unreduced prompt, and so has the text.
* "compact": the kept tokens stand in one block at the first image token, numbered on without gaps; the text moves up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.errors import UsageError, VerificationError
from exporter.graphset import PAD, GraphSet, VisualLayout

Ints = npt.NDArray[np.int64]
Prompts = Sequence[Sequence[int]]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Text:
    """The prompts without their image tokens, padded in front to one length."""

    ids: Ints
    """[batch, text]; 0 where padded."""
    mask: npt.NDArray[np.bool_]
    """[batch, text], True for real tokens."""


@dataclass(frozen=True)
class Tokens:
    """What the language model runs at once, or chunk by chunk."""

    embeds: Array
    """[batch, seq, hidden]"""
    position_ids: Ints
    """[batch, seq], or [3, batch, seq] with M-RoPE"""
    order: Ints
    """[batch, seq]; `PAD` where padded."""
    size: Array | None = None
    """float32 [batch, seq], where the language model counts what a token stands for."""
    reach: Ints | None = None
    """[batch, seq], where tokens see others behind them: order of the last one."""

    def in_prompt_order(self) -> Tokens:
        """The same with the padding of every row first, then its tokens by `order`."""
        rank = np.where(self.order == PAD, -1, self.order).argsort(axis=1, kind="stable")
        rows = np.arange(len(rank))[:, None]
        size = None if self.size is None else self.size[rows, rank]
        reach = None if self.reach is None else self.reach[rows, rank]
        return Tokens(self.embeds[rows, rank], self.position_ids[..., rows, rank], self.order[rows, rank], size, reach)

    def chunks(self, most: int) -> Iterator[Tokens]:
        """Consecutive parts of at most `most` tokens and about equal length, given the tokens in the order of the prompt.

        Tokens of equal order see each other and stay together (CLS and the first patch), so a chunk can be a little shorter.
        """
        seq, first = self.order.shape[1], 0
        most = -(-seq // -(-seq // most))
        left, right = self.order[:, :-1], self.order[:, 1:]
        cuts = np.flatnonzero(((left != right) | (left == PAD)).all(axis=0)) + 1
        while first < seq:
            last = seq
            if seq - first > most:
                last = int(cuts[(cuts > first) & (cuts <= first + most)].max(initial=0)) or first + most
            part = slice(first, last)
            size = None if self.size is None else self.size[:, part]
            reach = None if self.reach is None else self.reach[:, part]
            yield Tokens(self.embeds[:, part], self.position_ids[..., part], self.order[:, part], size, reach)
            first = last


@dataclass(frozen=True)
class Places:
    """Where every token of [visual tokens | padding | text] stands."""

    position_ids: Ints
    """[batch, seq], or [3, batch, seq] with M-RoPE; 0 where padded."""
    order: Ints
    """[batch, seq]; `PAD` where padded."""
    next_position: Ints
    """[batch]: position id of the first token after the prompt, on every axis."""
    next_order: Ints
    """[batch]: its order."""
    reach: Ints | None = None
    """[batch, seq]: order of the last token that each one sees, where that is not always its own; `PAD` where padded."""


def pad(prompts: Prompts) -> Text:
    """Pad in front to the longest prompt."""
    width = max(map(len, prompts))
    ids = np.zeros((len(prompts), width), np.int64)
    mask = np.zeros((len(prompts), width), np.bool_)
    for row, prompt in enumerate(prompts):
        if len(prompt):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = True
    return Text(ids, mask)


def split(input_ids: Prompts, graphs: GraphSet) -> Text:
    """Take the image tokens out of the prompts.

    Args:
        input_ids: one prompt per row, each with exactly `graphs.visual.placeholders` image tokens, not yet expanded.
        graphs: the exported model.
    Raises:
        UsageError: another number of image tokens, nothing behind the last one, an id outside the vocabulary.
    """
    image, wanted = graphs.text.image_token, graphs.visual.placeholders
    if not len(input_ids):
        raise UsageError("No prompt was given.")
    for row, prompt in enumerate(input_ids):
        found = sum(token == image for token in prompt)
        if found != wanted:
            expanded = found == graphs.visual.total
            hint = " Give the prompt as it is before a processor expands its image tokens." if expanded else ""
            raise UsageError(
                f"Prompt {row} holds {found} image tokens (id {image}); this model was exported for {wanted}, one per "
                f"image or clip.{hint}"
            )
        if not len(prompt) or prompt[-1] == image:
            raise UsageError(f"Prompt {row} ends with an image token; expected text behind it, such as the question.")
        check_ids([token for token in prompt if token != image], graphs, row)
    return pad([[token for token in prompt if token != image] for prompt in _with_readers(input_ids, graphs)])


def _with_readers(input_ids: Prompts, graphs: GraphSet) -> Prompts:
    """The prompts with `graphs.visual.readers` behind their last image token."""
    readers, image = graphs.visual.readers, graphs.text.image_token
    if not readers:
        return input_ids
    ends = [len(prompt) - list(reversed(prompt)).index(image) for prompt in input_ids]
    return [[*prompt[:end], *readers, *prompt[end:]] for prompt, end in zip(input_ids, ends, strict=True)]


def check_ids(tokens: Sequence[int], graphs: GraphSet, row: int) -> None:
    """Raise UsageError for an id that the embedding table does not have."""
    outside = [token for token in tokens if not 0 <= token < graphs.text.vocab]
    if outside:
        raise UsageError(
            f"Prompt {row} holds token id {outside[0]}; this model's vocabulary is 0 to {graphs.text.vocab - 1}. "
            "Was another model's tokenizer used?"
        )


def arrange(input_ids: Prompts, index: Ints, graphs: GraphSet) -> Places:
    """Positions and order of the visual tokens, then the text.

    Args:
        input_ids: the prompts, as checked by `split`.
        index: int64 [batch, kept]: each kept token's place among all visual tokens before reduction (frames one after
            another, each in raster order; behind those of a placeholder its fixed ones); -1 for a token that is no patch (CLS): it stands at the first placeholder.
        graphs: the exported model.
    """
    visual, axes = graphs.visual, graphs.text.position_axes
    expected = (len(input_ids), visual.kept)
    if index.shape != expected or not ((index >= -1) & (index < visual.total)).all():
        raise VerificationError(
            f"`reduce` returned an index of shape {list(index.shape)} and values {index.min(initial=0)} "
            f"to {index.max(initial=0)}; expected shape {list(expected)} and values -1 to {visual.total - 1}. Run validate."
        )
    input_ids = _with_readers(input_ids, graphs)
    image, width = graphs.text.image_token, max(map(len, input_ids)) - visual.placeholders
    seq = visual.kept + width
    positions = np.zeros((axes, len(input_ids), seq), np.int64)
    order = np.full((len(input_ids), seq), PAD, np.int64)
    next_position, next_order = np.empty(len(input_ids), np.int64), np.empty(len(input_ids), np.int64)
    place = _kept_places if visual.policy == "keep" else _compact_places
    for row, prompt in enumerate(input_ids):
        is_image = np.asarray(prompt, np.int64) == image
        tokens, text, end = place(is_image, index[row], visual, axes)
        first = seq - text.shape[1]
        positions[:, row, : visual.kept], order[row, : visual.kept] = tokens[1:], tokens[0]
        positions[:, row, first:], order[row, first:] = text[1], text[0]
        next_order[row], next_position[row] = end
    return Places(
        positions if axes > 1 else positions[0], order, next_position, next_order, _reach(order, index, visual)
    )


def _reach(order: Ints, index: Ints, visual: VisualLayout) -> Ints | None:
    """[batch, seq]: order of the last token that each one sees; None where all look back only."""
    if visual.sees == "before":
        return None
    if visual.sees == "prompt":
        last = np.where(order == PAD, -1, order).max(axis=1, keepdims=True)
        return np.where(order == PAD, PAD, last)
    reach, kept = order.copy(), index.shape[1]
    holders = np.maximum(index, 0) // (visual.total // visual.placeholders)
    for row, holder in enumerate(holders):
        last = np.zeros(visual.placeholders, np.int64)
        np.maximum.at(last, holder, order[row, :kept])
        reach[row, :kept] = last[holder]
    return reach


def _kept_places(
    is_image: npt.NDArray[np.bool_], index: Ints, visual: VisualLayout, axes: int
) -> tuple[Ints, Ints, tuple[int, int]]:
    """[1 + axes, kept] and [2, text] (order, then positions), and the (order, position) that come next."""
    each = visual.total // visual.placeholders
    # In the unreduced prompt a placeholder stands for its tokens, and for its span of positions: so much further is what follows it.
    more = np.array([[each - 1], [visual.span - 1]])
    images, words = is_image.nonzero()[0], (~is_image).nonzero()[0]
    begin = images + more * np.arange(len(images))
    holder, offset = np.divmod(index, each)
    holder[index < 0], offset[index < 0] = 0, each
    ids = visual.id_rows[offset].T
    tokens = np.empty((1 + axes, len(index)), np.int64)
    # Tiles are seen one by one, but written row by row over all of them: where positions count, they say the order.
    tokens[0] = begin[0, holder] + (np.where(index < 0, 0, offset) if axes > 1 else ids[0])
    tokens[1:] = begin[1, holder] + ids
    text = words + more * (words - np.arange(len(words)))
    end = len(is_image) + more[:, 0] * len(images)
    return tokens, text, (int(end[0]), int(end[1]))


def _compact_places(
    is_image: npt.NDArray[np.bool_], index: Ints, visual: VisualLayout, axes: int
) -> tuple[Ints, Ints, tuple[int, int]]:
    """As `_kept_places`; here order and position are one, and all axes are equal."""
    kept, before = len(index), int(is_image.argmax())
    tokens = np.broadcast_to(before + np.arange(kept, dtype=np.int64), (1 + axes, kept))
    text = np.arange(int((~is_image).sum()), dtype=np.int64)
    text[before:] += kept
    end = kept + len(text)
    return tokens, np.broadcast_to(text, (2, len(text))), (end, end)
