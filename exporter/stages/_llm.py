"""The language model's graphs: their inputs and outputs by name, and the call from one to the other. The same for a graph
that is drawn and for modules that compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from exporter.nn.cuts import Shorten
from exporter.plan import Plan
from exporter.stages._draw import Shape, draw

if TYPE_CHECKING:
    from exporter.nn.traced import LanguageModel

Inputs = dict[str, tuple[Shape, torch.dtype]]


def draw_llm(plan: Plan, module: LanguageModel, dtype: torch.dtype) -> ir.Model:
    """Prefill with a static visual count if the module drops tokens, else prefill and decode in one, everything dynamic."""
    sizes = {"seq": plan.kept + 7} if module.kept else {}
    return draw(
        module, llm_inputs(plan, module, dtype), lambda v: call_llm(module, v), llm_outputs(plan, module), sizes
    )


def llm_inputs(plan: Plan, module: LanguageModel, dtype: torch.dtype) -> Inputs:
    """Name → shape and dtype, in order."""
    g, kv = plan.geometry, module.layout
    axes = (3,) if g.position_axes == 3 else ()
    found: Inputs = {
        "inputs_embeds": (("batch", "seq", module.spec.width), dtype),
        "position_ids": ((*axes, "batch", "seq"), torch.int64),
        "order": (("batch", "seq"), torch.int64),
    }
    if module.spec.reach:
        found["reach"] = ("batch", "seq"), torch.int64
    if plan.sized:
        found["size"] = ("batch", "seq"), torch.float32
    for name in module.of_tower:
        site = plan.at("in_llm")[0].site
        shape = "batch", site.frames, site.tokens
        found[name] = ((*shape, site.patch_dim), dtype) if name.startswith("patches@") else (shape, torch.float32)
    if module.kept:
        return found
    kept = dtype if module.int8 is None else torch.int8
    for kind in ("key", "value"):
        for layer, group in enumerate(kv.groups):
            found[f"past_{kind}_{layer}"] = ("batch", g.kv_heads, kv.lengths[group], g.head_dim), kept
    for group, count in enumerate([] if module.int8 is None else module.int8.counts):
        found[f"past_scale_{group}"] = ("batch", count * g.kv_heads, kv.lengths[group], 1), dtype
    for kind, number in _places(plan).items():
        for group, length in enumerate(kv.lengths):
            heads = (g.kv_heads,) if kv.per_head[group] else ()
            found[f"past_{kind}_{group}"] = ("batch", *heads, length), number
    for watch in module.watch.values():
        found["past_starts"] = ("batch", 3), torch.int64
        if watch.method.state:
            found["past_state"] = ("batch", watch.method.state), torch.float32
    return found


def llm_outputs(plan: Plan, module: LanguageModel) -> list[str]:
    """Names, in order."""
    presents = [f"present_{kind}_{i}" for i in range(len(module.layers)) for kind in ("key", "value")]
    groups = range(len(module.layout.kept))
    scales = [] if module.int8 is None else [f"present_scale_{i}" for i in groups]
    places = [f"present_{kind}_{i}" for kind in _places(plan) for i in groups]
    watched = [name for watch in module.watch.values() for name in watch.outputs]
    return ["logits", *presents, *scales, *places, *module.kept, *watched]


def call_llm(module: LanguageModel, values: Mapping[str, Any]) -> Sequence[Any]:
    """Run the module on its inputs by name."""
    layers, groups = range(len(module.layers)), range(len(module.layout.kept))

    def past(kind: str, numbers: range) -> list[Any]:
        return [values[name] for name in (f"past_{kind}_{i}" for i in numbers) if name in values]

    found: Sequence[Any] = module(
        values["inputs_embeds"], values["position_ids"], values["order"], past("key", layers), past("value", layers),
        past("order", groups), values.get("size"), past("size", groups), values.get("past_starts"), values.get("past_state"),
        [values[name] for name in module.of_tower], values.get("reach"), past_scales=past("scale", groups),
    )  # fmt: skip
    return found


class Bucket:
    """The graph of one bucket of a method that goes on while decoding: its cut of the cache.

    Args:
        number: from 0 on.
    """

    def __init__(self, plan: Plan, number: int) -> None:
        assert plan.while_decoding is not None
        name, method = plan.while_decoding
        (first,) = method.layers
        counts = [method.kept(first), *(keep for _, keep in method.buckets)]
        self.plan, self.layers = plan, range(first, plan.geometry.layers)
        self.present, self.group = counts[number], plan.kv.groups[first]
        self.module = torch.nn.Module()  # the owner gives its nodes the method's name
        self.module.add_module(name, Shorten(method, self.present, counts[number + 1]))
        self.atom = self.module.get_submodule(name)
        self.past = [f"past_{kind}_{self.group}" for kind in _places(plan)]
        self.past += [f"past_{kind}_{layer}" for layer in self.layers for kind in ("key", "value")]
        self.int8 = plan.profile.precision.kv == "int8"
        self.past += [f"past_scale_{self.group}"] if self.int8 else []

    def inputs(self, dtype: torch.dtype) -> Inputs:
        g = self.plan.geometry
        found: Inputs = {
            "attention_row": (("batch", "row"), torch.float32),
            "kept": (("batch", self.present), torch.int64),
        }
        for kind, number in _places(self.plan).items():
            found[f"past_{kind}_{self.group}"] = ("batch", "past"), number
        if self.int8:
            found[f"past_scale_{self.group}"] = ("batch", 2 * len(self.layers) * g.kv_heads, "past", 1), dtype
        kept = torch.int8 if self.int8 else dtype
        found |= {name: (("batch", g.kv_heads, "past", g.head_dim), kept) for name in self.past if name not in found}
        return found

    def outputs(self) -> list[str]:
        return ["kept_now", *("present" + name[4:] for name in self.past)]

    def call(self, values: Mapping[str, Any]) -> Sequence[Any]:
        size = [] if self.plan.sized else [None]
        past = [values[name] for name in self.past]
        found: Sequence[Any] = self.atom(values["attention_row"], values["kept"], past[0], *size, *past[1:])
        return found

    def draw(self, dtype: torch.dtype) -> ir.Model:
        sizes = {"past": self.present + 5, "row": self.plan.kept + 11}
        return draw(self.module, self.inputs(dtype), self.call, self.outputs(), sizes)


def buckets(plan: Plan) -> list[Bucket]:
    found = plan.while_decoding
    return [Bucket(plan, number) for number in range(len(found[1].buckets))] if found else []


def _places(plan: Plan) -> dict[str, torch.dtype]:
    """What the cache holds of every token besides keys and values."""
    return {"order": torch.int64} | ({"size": torch.float32} if plan.sized else {})
