"""Counts a plan's work: its modules, the ones that are exported, run on the meta device, shapes without numbers.

So there is one count for all families and all reductions, and what a method itself computes is in it. Counted are products:
matrices, attention, convolutions. What stands between them (norms, activations, additions, softmax) is fused into them by every
runtime that we build for, and left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from exporter.cost.work import Engine, Operator, Stage, Work
from exporter.plan import Plan
from exporter.stages._describe import reduce_inputs
from exporter.stages._llm import Inputs, call_llm, llm_inputs
from exporter.stages._modules import DTYPES, Modules, build_modules
from exporter.stages._store import rounding
from profiles._schema import Precision


@dataclass(frozen=True)
class Load:
    """What is asked of the model at once: samples, prompt tokens besides the visual ones, and tokens generated so far."""

    batch: int
    text: int
    generated: int


def count(plan: Plan, load: Load, most: Load) -> Work:
    """The work of every stage, at `load`, and what its engines hold, at `most`.

    Raises:
        CheckpointError: the model's modules can only be had with its weights, and they are not there (`families._traced`).
    """
    modules = build_modules(plan)
    dtype = DTYPES[plan.profile.precision.compute]
    for module in _distinct(modules):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        module.to("meta")
    at_work = _stages(plan, modules, load, dtype)
    stages = tuple(found.stage(name) for name, (found, _) in at_work.items())
    largest = _stages(plan, modules, most, dtype)
    held = {"vision": ["vision"], "reduce": ["reduce"], "question": ["question"], "llm": ["prefill", "decode"]}
    if modules.prefill is not modules.decode:
        del held["llm"]
        held |= {"prefill": ["prefill"], "decode": ["decode"]}
    engines = []
    for name, roles in held.items():
        runs = [largest[role] for role in roles if role in largest]
        if runs:
            weights = runs[0][0].weights
            engines.append(
                Engine(name, tuple(roles), sum(weights.values()), max(found.peak(out) for found, out in runs),
                       *max(((n, b) for n, b in weights.items()), key=lambda item: item[1], default=("", 0)),
                       max(found.widest for found, _ in runs))
            )  # fmt: skip
    held_by = [held for name, held in _decoded(plan, modules, most, dtype).items() if name.startswith("past_")]
    return Work(stages, tuple(engines), tuple(t.nbytes for t in held_by))


def _distinct(modules: Modules) -> list[nn.Module]:
    found = [modules.vision, modules.question, modules.reduce, modules.prefill, modules.decode]
    return list({id(m): m for m in found if m is not None}.values())


def _stages(plan: Plan, modules: Modules, load: Load, dtype: torch.dtype) -> dict[str, tuple[Counting, Any]]:
    """Stage → what was counted, and its outputs."""
    precision = plan.profile.precision
    done: dict[str, tuple[Counting, Any]] = {}

    def run(name: str, module: nn.Module, call: Callable[[], Any], quantised: bool = False) -> Any:
        counting = Counting(module, precision if quantised else replace(precision, weights="none", blocks=()), dtype)
        with torch.device("meta"), torch.no_grad(), counting:
            outputs = call()
        done[name] = counting, outputs
        return outputs

    image = plan.geometry.image
    sizes = {"batch": load.batch, "text": load.text}
    pixels = _empty({"pixel_values": (("batch", plan.geometry.frames, 3, image.height, image.width), dtype)}, sizes)
    signals = dict(zip(plan.taps, run("vision", modules.vision, lambda: modules.vision(*pixels.values())), strict=True))
    if modules.question is not None:
        question = modules.question
        ids = torch.empty(load.batch, question.spec.tokens, dtype=torch.int64, device="meta")
        run("question", question, lambda: [question(ids)])
    taken: Inputs = {name: ((*value.shape,), value.dtype) for name, value in signals.items() if name in plan.for_reduce}
    given = _empty(reduce_inputs(plan, taken, dtype), sizes)
    run("reduce", modules.reduce, lambda: modules.reduce(*given.values()))
    nothing = dict.fromkeys(plan.kv.lengths, 0)
    prompt = _empty(llm_inputs(plan, modules.prefill, dtype), sizes | {"seq": plan.kept + load.text} | nothing)
    run("prefill", modules.prefill, lambda: call_llm(modules.prefill, prompt), True)
    step = _decoded(plan, modules, load, dtype)
    run("decode", modules.decode, lambda: call_llm(modules.decode, step), True)
    return done


def _decoded(plan: Plan, modules: Modules, load: Load, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a decode step takes behind so many tokens."""
    past, kv = load.text + load.generated, plan.kv
    lengths = {name: kept + past for name, kept in zip(kv.lengths, kv.kept, strict=True)}
    return _empty(llm_inputs(plan, modules.decode, dtype), {"batch": load.batch, "seq": 1} | lengths)


def _empty(inputs: Inputs, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return {
        name: torch.empty([sizes[d] if isinstance(d, str) else d for d in shape], dtype=kind, device="meta")
        for name, (shape, kind) in inputs.items()
    }


class Counting(TorchDispatchMode):
    """Sees every operator of a run and counts the products among them.

    A product of two activations makes scores, as in queries · keys, or uses them, as in scores · values. Scores are told apart, as
    fused attention never writes them: what a product of activations makes is scores, and so is what is made of them by operators
    that keep their size. Likewise floats that are made of integers, as keys and values of an INT8 cache are: what reads them reads
    the integers.
    """

    def __init__(self, module: nn.Module, precision: Precision, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[Operator] = Counter()
        self._of_storage = {_storage(p): (name, p) for name, p in module.named_parameters()}
        self._multiplied: set[str] = set()
        self._parameters = dict(module.named_parameters())
        self._precision, self._dtype = precision, dtype
        self._scores: dict[int, StorageWeakRef] = {}
        self._each: dict[int, tuple[StorageWeakRef, float]] = {}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._held: list[dict[int, int]] = []
        self._met: list[StorageWeakRef] = []  # as long as they are here, no address stands for two storages

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self._product(func, int(flops(*args, **(kwargs or {}), out_val=out)), taken, made)
        elif any(_storage(t) in self._scores for t in taken):
            largest = max(t.numel() for t in taken if _storage(t) in self._scores)
            self._mark(t for t in made if t.numel() >= largest)
        else:
            self._narrow(taken, made)
        for tensor in made:
            key = _storage(tensor)
            if key not in self._of_storage and key not in self._alive:
                storage = tensor.untyped_storage()
                self._alive[key] = StorageWeakRef(storage), storage.nbytes()
                self._met.append(self._alive[key][0])
        if flops is not None:
            self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
            self._held.append({k: size for k, (_, size) in self._alive.items() if k not in self._scores})
        return out

    def _product(self, func: Any, flops: int, taken: list[Tensor], made: list[Tensor]) -> None:
        weights = [self._of_storage[_storage(t)][0] for t in taken if _storage(t) in self._of_storage]
        for name in weights:
            if self._parameters[name].ndim == 2:
                self._multiplied.add(name)
        kind: Literal["matrix", "convolution", "attention"] = "attention"
        if weights:
            kind = "convolution" if "convolution" in str(func) else "matrix"
        scores = [t for t in taken if _storage(t) in self._scores]
        if kind == "attention" and not scores:
            self._mark(made)
            scores = made
        moved = [t for t in (*taken, *made) if _storage(t) not in self._of_storage and not any(t is s for s in scores)]
        weight_bytes = sum(self.stored(name) for name in set(weights))
        moved_bytes = round(sum(t.numel() * self._bytes_each(t) for t in moved))
        self.found[Operator(kind, flops, weight_bytes, moved_bytes, _bytes(scores))] += 1

    def _narrow(self, taken: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Note how many bytes an element is read from, where floats are made of integers."""
        of = [t for t in taken if t.dtype == torch.int8 or _storage(t) in self._each]
        least = max((t.numel() for t in of), default=0)
        for t in made:
            if least and t.is_floating_point() and t.numel() >= least and _storage(t) not in self._each:
                read = sum(s.numel() * self._bytes_each(s) for s in taken)
                self._each[_storage(t)] = StorageWeakRef(t.untyped_storage()), read / t.numel()

    def _bytes_each(self, tensor: Tensor) -> float:
        """Bytes of memory that an element stands for."""
        found = self._each.get(_storage(tensor))
        return tensor.dtype.itemsize if found is None else found[1]

    def _mark(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._scores[_storage(tensor)] = StorageWeakRef(tensor.untyped_storage())

    def stored(self, name: str) -> int:
        """Bytes of a parameter in the graph's weights."""
        parameter = self._parameters[name]
        own = name.startswith("lm_head") or ".lm_head." in name or "_trained." in name
        form = None
        if self._precision.weights != "none" and not own and name in self._multiplied:
            form = rounding(self._precision).form(parameter.shape[0], self._precision.blocks)
        if form is None:
            return parameter.numel() * self._dtype.itemsize
        return form.bytes((parameter.shape[0], parameter.shape[1]), self._dtype.itemsize)

    @property
    def weights(self) -> dict[str, int]:
        """Parameter → bytes in the graph."""
        return {name: self.stored(name) for name in self._parameters}

    @property
    def widest(self) -> int:
        """Bytes of the largest quantised parameter, were it stored as floats."""
        floats = {name: p.numel() * self._dtype.itemsize for name, p in self._parameters.items()}
        return max((size for name, size in floats.items() if self.stored(name) < size), default=0)

    def peak(self, outputs: Any) -> int:
        """Bytes of activations that are alive at once, at most: what leaves the stage is not among them, and no scores."""
        left = {_storage(t) for t in tree_leaves(outputs) if isinstance(t, Tensor)}
        return max((sum(size for key, size in held.items() if key not in left) for held in self._held), default=0)

    def stage(self, name: str) -> Stage:
        return Stage(name, tuple(replace(op, count=n) for op, n in self.found.items()))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)
