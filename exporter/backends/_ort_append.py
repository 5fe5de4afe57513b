"""Runs a graph that appends to its cache in place (`exporter.flavours.ort`), with the inputs and outputs of the plain one.

All that a step reads and writes is memory that is bound once: keys and values (`Memory`), tables of angles (`Tables`), logits, and the
few numbers that are new in every step, which are counted up where they lie (`hand_over`). Only another number of rows or tokens, or a cache
that lies elsewhere, is bound anew; the cache goes from step to step as one value. For a small model that is what a step costs beside
the graph: ONNX Runtime takes some microseconds to bind, to hand out or to wrap a value, and Python as much to look at one of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from exporter.backends._contract import PAST, PRESENT, Array
from exporter.backends._ort_angles import Angles, Tables
from exporter.backends._ort_cache import Grown, Memory
from exporter.errors import UsageError
from exporter.flavours._contract import COS, LAST, LENGTH, PLACES, SIN, TOTAL
from exporter.graphset import PAD

_OURS = (LAST, PLACES, COS, SIN, LENGTH, TOTAL)
"""How inputs begin that the plain graph does not have."""


class Handed(NamedTuple):
    """What somebody sets before each of many runs of one token per row, and reads behind it."""

    most: int
    """Runs there is room for."""
    embeds: Sequence[Array]
    """Per row, where its token's embedding goes: float32 [width]."""
    counters: Sequence[tuple[Array, int, int]]
    """(array, index, what it holds now): numbers that are one more in every run."""
    logits: Array
    """float32 [rows, vocab], which every run writes over."""


NOTHING = Handed(0, (), (), np.empty((0, 0), np.float32))


class Appending:
    """One session on the CPU.

    Args:
        session: of a graph with the input `LAST`.
        types: of its inputs.
        angles: positions → what its tokens are rotated by.
        make: array → OrtValue of the same memory.
        numpy: a value that was fed → array.
    """

    def __init__(
        self, session: Any, types: Mapping[str, np.dtype[Any]], angles: Angles, make: Callable[[Array], Any],
        numpy: Callable[[Any], Array],
    ) -> None:  # fmt: skip
        self._session, self._make, self._numpy = session, make, numpy
        self._binding = session.io_binding()
        axes = {i.name: list(i.shape) for i in session.get_inputs()}
        self._groups = {f"past_order_{n[len(LENGTH) :]}": n[len(LENGTH) :] for n in axes if n.startswith(LENGTH)}
        self._cache = {name: PRESENT + name[len(PAST) :] for name in axes if name.startswith(PAST)}
        self._axes = {n: a for n, a in axes.items() if not n.startswith((PAST, *_OURS))}
        self._axes["position_ids"] = angles.axes
        self._vocab = session.get_outputs()[0].shape[1]
        kinds = {**types, "position_ids": np.dtype(np.int64), "order": np.dtype(np.int64)}
        self.new = {name: kinds[name] for name in (*self._axes, "order")}
        """Inputs that are not the cache, and their types."""
        orders = dict.fromkeys(self._groups, np.dtype(np.int64))
        self.inputs = {**self.new, **{name: types[name] for name in self._cache}, **orders}
        self.outputs = ("logits", *self._cache.values(), *(PRESENT + name[len(PAST) :] for name in self._groups))
        self._tables = Tables(angles, lambda name, array: self._binding.bind_ortvalue_input(name, make(array)))
        self._memory: Memory | None = None
        self._longest = 0
        self._row: int | None = None
        self._known: tuple[tuple[int, int], dict[str, tuple[int, ...]]] = (0, 0), {}
        self._shape = 0, 0
        self._new: dict[str, Array] = {}
        self.user: object = None
        """To whom it was handed over: nobody else has run the graph since."""

    def grow(self, feeds: Mapping[str, Any], past: Mapping[str, Any]) -> tuple[dict[str, Any], Grown]:
        """As `Runner.grow`. feeds: as many as `new`, on the host."""
        self.user = None
        order = self._checked("order", feeds["order"])
        batch, seq = order.shape
        given = {name: self._checked(name, feeds[name], shape) for name, shape in self._shapes(batch, seq).items()}
        if not isinstance(past, Grown):
            past = {name: self._checked(name, value) for name, value in past.items()}
        before = Grown.of(past, seq, self._memory)
        padding = (order == PAD).sum(axis=1, dtype=np.int32) if order.max() == PAD else None
        if (order[:, 1:] < order[:, :-1]).any():  # the padding goes last
            rank = order.argsort(axis=1, kind="stable")
            order = np.take_along_axis(order, rank, axis=1)
            given = {name: _sorted(given[name], rank, axes.index("seq")) for name, axes in self._axes.items()}
        first = all(before.length(name) == 0 for name in self._groups)
        if batch == 1 or (seq == 1 and not first) or (first and _alike(given["position_ids"])):
            logits = self._run(given, before, padding, batch, seq)
        else:
            logits = np.concatenate([self._run(given, before, padding, 1, seq, row) for row in range(batch)])
        return {"logits": logits}, before.grown(order, padding)

    def hand_over(self, user: object, past: Grown, width: int) -> Handed:
        """Let somebody whose rows, one token each, have just been run together go on by `run`, and keep room for that.

        past: what they have got. width: of an embedding.
        """
        memory, new = past.memory, self._new
        if self._row is not None or self._shape[1] > 1 or memory is not self._memory:
            return NOTHING
        self.user = user
        counters = [
            (a.reshape(-1), row, begin)
            for a in (new[PLACES], *self._lengths())
            for row, begin in enumerate(a.reshape(-1).tolist())
        ]
        most = past.reserve(self._tables.left(new[PLACES]))
        return Handed(most, list(new["inputs_embeds"][:, 0, :width]), counters, new["logits"])

    def run(self) -> None:
        """Once more, as everything is bound."""
        self._session.run_with_iobinding(self._binding)

    def _lengths(self) -> Iterator[Array]:
        """Memory that is bound, int32: of every KV group, the tokens of each row less one [batch], and of all there may be [1]."""
        for group in self._groups.values():
            yield self._new[LENGTH + group]
            yield self._new[TOTAL + group]

    def _run(
        self, given: Mapping[str, Array], before: Grown, padding: Array | None, batch: int, seq: int, row: int | None = None
    ) -> Array:  # fmt: skip
        """Logits [batch, vocab].

        Args:
            given: new tokens, in the order of the prompt. padding: int64 [rows], how many of a row are that; None is none.
            row: the only one to run; None is all.
        """
        counts = before.padding
        if row is not None:
            only = slice(row, row + 1)
            given = {name: given[name][_at(axes.index("batch"), only)] for name, axes in self._axes.items()}
            counts = {name: count[only] for name, count in counts.items()}
            padding = None if padding is None else padding[only]
        self._bind(before.memory, row, batch, seq)
        new = self._new
        for name in self._axes:
            new[name][...] = given[name]
        self._tables.turn(new["position_ids"], self._longest, new[PLACES])
        if seq > 1:
            new[LAST][...] = seq - 1 if padding is None else np.maximum(seq - 1 - padding, 0)[:, None]
        for name, group in self._groups.items():
            total = before.length(name) + seq
            new[LENGTH + group][...] = total - 1 - counts.get(name, 0)
            new[TOTAL + group][0] = total
        self.run()
        found: Array = new["logits"].copy()
        return found

    def _bind(self, memory: Memory, row: int | None, batch: int, seq: int) -> None:
        """Bind a cache, or one row of it, and memory for so many new rows and tokens, where they are not bound."""
        if memory is not self._memory or row != self._row:
            self._memory = None
            for name, present in self._cache.items():
                array = memory.arrays[name]
                value = self._make(array if row is None else array[row : row + 1])
                self._binding.bind_ortvalue_input(name, value)
                self._binding.bind_ortvalue_output(present, value)
            self._longest = max(memory.arrays[name].shape[2] for name in self._cache)
            self._memory, self._row = memory, row
        if (batch, seq) != self._shape:
            self._lay_out(batch, seq)

    def _lay_out(self, batch: int, seq: int) -> None:
        """Bind memory for so many rows and tokens."""
        self._shape = 0, 0
        new = {name: np.empty(shape, self.new[name]) for name, shape in self._shapes(batch, seq).items()}
        new[PLACES], new[LAST] = np.empty((batch, seq), np.int64), np.zeros((batch, 1), np.int64)
        for group in self._groups.values():
            new[LENGTH + group], new[TOTAL + group] = np.empty(batch, np.int32), np.empty(1, np.int32)
        for name, array in new.items():
            if name != "position_ids":
                self._binding.bind_ortvalue_input(name, self._make(array))
        new["logits"] = np.empty((batch, self._vocab), np.float32)
        self._binding.bind_ortvalue_output("logits", self._make(new["logits"]))
        self._new, self._shape = new, (batch, seq)

    def _shapes(self, batch: int, seq: int) -> dict[str, tuple[int, ...]]:
        """Those of the inputs that are neither the cache nor counts."""
        if self._known[0] != (batch, seq):
            sizes = {"batch": batch, "seq": seq}
            shapes = {name: tuple(sizes.get(axis, axis) for axis in axes) for name, axes in self._axes.items()}
            self._known = (batch, seq), shapes
        return self._known[1]

    def _checked(self, name: str, value: Any, shape: tuple[int, ...] | None = None) -> Array:
        """A value on the host, as the graph takes it; a mistake would otherwise be cast, or broadcast."""
        array, wanted = self._numpy(value), self.inputs[name]
        if array.dtype != wanted:
            raise UsageError(f"Input '{name}' is {array.dtype}, expected {wanted}.")
        if shape is not None and array.shape != shape:
            raise UsageError(f"Input '{name}' has shape {list(array.shape)}, expected {list(shape)}.")
        return array


def _alike(positions: Array) -> bool:
    """Whether GroupQueryAttention rotates a first prompt's rows rightly: all like the first one. positions: [..., batch, seq]"""
    return bool((positions == positions[..., :1, :]).all())


def _sorted(value: Array, rank: Array, axis: int) -> Array:
    """Tokens of every row by rank [batch, seq]; those of a value lie along `axis`, its rows along the one before."""
    index: tuple[Any, ...] = (*[slice(None)] * (axis - 1), np.arange(len(rank))[:, None], rank)
    found: Array = value[index]
    return found


def _at(axis: int, index: slice) -> tuple[slice, ...]:
    """An index along one axis."""
    return (*[slice(None)] * axis, index)
