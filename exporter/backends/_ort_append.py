"""Runs a graph that appends to its cache in place (`exporter.flavours.ort`), with the inputs and outputs of the plain one.

All that a step reads and writes is memory that is bound once: keys and values (`Held`), logits, and the few numbers that are
new in every step. Only another number of rows or tokens, or a cache that lies elsewhere, is bound anew. For a small model
that is what a step costs beside the graph: ONNX Runtime takes some microseconds to bind, to hand out or to wrap a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from exporter.backends._contract import Array
from exporter.backends._ort_cache import Held
from exporter.errors import UsageError
from exporter.flavours._contract import LAST, LENGTH, PLACES, TOTAL
from exporter.graphset import PAD


class Appending:
    """One session on the CPU.

    Args:
        session: of a graph with the input `LAST`.
        types: of its inputs.
        make: array → OrtValue of the same memory.
        numpy: a value that was fed → array.
    """

    def __init__(
        self, session: Any, types: Mapping[str, np.dtype[Any]], make: Callable[[Array], Any], numpy: Callable[[Any], Array]
    ) -> None:  # fmt: skip
        self._session, self._make, self._numpy = session, make, numpy
        self._binding = session.io_binding()
        axes = {i.name: list(i.shape) for i in session.get_inputs()}
        self._groups = {
            f"past_order_{n.removeprefix(LENGTH)}": n.removeprefix(LENGTH) for n in axes if n.startswith(LENGTH)
        }
        self._present = {name: "present" + name[4:] for name in axes if name.startswith(("past_key_", "past_value_"))}
        self._axes = {n: a for n, a in axes.items() if "seq" in a and n != PLACES}
        self._vocab = session.get_outputs()[0].shape[1]
        self.inputs = {
            **{name: types[name] for name in self._axes}, "order": np.dtype(np.int64),
            **{name: types[name] for name in self._present}, **dict.fromkeys(self._groups, np.dtype(np.int64)),
        }  # fmt: skip
        self.outputs = ("logits", *self._present.values(), *("present" + name[4:] for name in self._groups))
        self._shape = 0, 0
        self._new: dict[str, Array] = {}
        self._newest: dict[str, Held] = {}
        self._room = 0
        self._real: dict[str, tuple[Array, Array]] = {}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """As `Runner.run`. feeds: as many as `inputs`, on the host but for the cache."""
        order = self._numpy(feeds["order"])
        batch, seq = order.shape
        if seq > 1 and batch > 1 and self._numpy(feeds[next(iter(self._groups))]).shape[1]:
            return self._token_by_token(feeds)
        if self._shape != (batch, seq):
            self._lay_out(batch, seq)
        new = self._new
        rank = None if seq == 1 else order.argsort(axis=1, kind="stable")
        for name, axes in self._axes.items():
            value = self._checked(name, feeds[name])
            new[name][...] = value if rank is None else _sorted(value, rank, axes.index("seq"))
        real = order[:, 0] < PAD if rank is None else (order < PAD).sum(axis=1)
        if rank is not None:
            order = _sorted(order, rank, 1)
            np.maximum(real - 1, 0, out=new[LAST][:, 0])
        found: dict[str, Any] = {}
        for name, group in self._groups.items():
            past = self._numpy(feeds[name])
            counted, before = self._real.get(name, (None, None))
            if before is None or counted is not past:
                before = (past < PAD).sum(axis=1)
            np.add(before, seq - 1, out=new[LENGTH + group], casting="same_kind")
            new[TOTAL + group][0] = past.shape[1] + seq
            present = np.concatenate([past, order], axis=1)
            self._real[name] = present, before + real
            found["present" + name[4:]] = present
        if self._room < seq or any(feeds[n] is not h or h.memory.used != h.length for n, h in self._newest.items()):
            self._bind_cache(feeds, seq)
        self._session.run_with_iobinding(self._binding)
        self._newest, self._room = {name: held.grown(seq) for name, held in self._newest.items()}, self._room - seq
        found.update((self._present[name], held) for name, held in self._newest.items())
        found["logits"] = new["logits"].copy()
        return found

    def _lay_out(self, batch: int, seq: int) -> None:
        """Bind memory for so many rows and tokens."""
        sizes = {"batch": batch, "seq": seq}
        self._new = {
            name: np.empty([sizes.get(axis, axis) for axis in axes], self.inputs[name])
            for name, axes in self._axes.items()
        }
        self._new[PLACES] = np.arange(batch * seq).reshape(batch, seq)
        self._new[LAST] = np.zeros((batch, 1), np.int64)
        for group in self._groups.values():
            self._new[LENGTH + group], self._new[TOTAL + group] = np.empty(batch, np.int32), np.empty(1, np.int32)
        for name, array in self._new.items():
            self._binding.bind_ortvalue_input(name, self._make(array))
        self._new["logits"] = np.empty((batch, self._vocab), np.float32)
        self._binding.bind_ortvalue_output("logits", self._make(self._new["logits"]))
        self._shape = batch, seq

    def _bind_cache(self, feeds: Mapping[str, Any], tokens: int) -> None:
        """Bind keys and values with room for new tokens, each as past and as present."""
        self._room = 0
        for name, present in self._present.items():
            past = feeds[name]
            held = Held.with_room(past if isinstance(past, Held) else self._checked(name, past), tokens, self._make)
            if name not in self._newest or self._newest[name].memory is not held.memory:
                self._binding.bind_ortvalue_input(name, held.value)
                self._binding.bind_ortvalue_output(present, held.value)
            self._newest[name] = held
        self._room = min(held.room for held in self._newest.values())

    def _checked(self, name: str, value: Any) -> Array:
        """A value on the host, in the type that the graph takes; a mistake would otherwise be cast, or broadcast."""
        array, wanted = self._numpy(value), self.inputs[name]
        if array.dtype != wanted:
            raise UsageError(f"Input '{name}' is {array.dtype}, expected {wanted}.")
        if name in self._axes and array.shape != self._new[name].shape:
            raise UsageError(f"Input '{name}' has shape {list(array.shape)}, expected {list(self._new[name].shape)}.")
        return array

    def _token_by_token(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """GroupQueryAttention does not append several tokens to several rows."""
        axis = {name: axes.index("seq") for name, axes in self._axes.items()} | {"order": 1}
        new = {name: self._numpy(feeds[name]) for name in axis}
        past = {name: value for name, value in feeds.items() if name not in new}
        found: dict[str, Any] = {}
        for i in range(new["order"].shape[1]):
            found = self.run({**{name: value.take([i], axis[name]) for name, value in new.items()}, **past})
            past = {name: found["present" + name[4:]] for name in past}
        return found


def _sorted(value: Array, rank: Array, axis: int) -> Array:
    """Tokens of every row by rank [batch, seq]; those of a value lie along `axis`, its rows along the one before."""
    index: tuple[Any, ...] = (*[slice(None)] * (axis - 1), np.arange(len(rank))[:, None], rank)
    found: Array = value[index]
    return found
