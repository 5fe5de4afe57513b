"""The eager modules of a plan, on the meta device or with the checkpoint's weights, and where each weight comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from exporter.clip import text_spec
from exporter.nn.cache import Int8
from exporter.nn.clip_text import ClipText
from exporter.nn.reduce import Reduce
from exporter.plan import Plan
from exporter.weights import Source, elsewhere, fill, sources, trained

if TYPE_CHECKING:
    from exporter.nn.traced import LanguageModel

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Modules:
    """The eager modules of a plan: what is traced, and, with weights, the PyTorch reference.

    prefill and decode are the same object unless something is pruned inside the language model; question is None unless a
    reduction reads the question with CLIP.
    """

    vision: nn.Module
    question: ClipText | None
    reduce: Reduce
    prefill: LanguageModel
    decode: LanguageModel

    def stored(self) -> dict[str, nn.Module]:
        """Weight file → the module whose parameters it holds."""
        found: dict[str, nn.Module] = {"vision": self.vision, "reduce": self.reduce, "llm": self.decode}
        return found if self.question is None else found | {"question": self.question}


def origins(plan: Plan, modules: Modules) -> dict[str, dict[str, Source]]:
    """Weight file → parameter name → where it comes from: the checkpoint, the CLIP checkpoint, a method's own file."""
    found = {"vision": sources(modules.vision, "vision"), "llm": sources(modules.decode, "text")}
    found["reduce"] = trained(plan, "before_llm", "{}") | trained(plan, "projector", "{}")
    found["llm"] |= trained(plan, "in_llm", "{}_trained") | trained(plan, "in_cache", "{}_trained")
    if modules.reduce.projector is not None:
        found["reduce"] |= {f"projector.{k}": v for k, v in sources(modules.reduce.projector, "projector").items()}
    if plan.request.clip is not None and "aligned" in plan.taps:
        tap = elsewhere(modules.vision.get_submodule("tap_aligned"), "aligned", plan.request.clip)
        found["vision"] |= {f"tap_aligned.{k}": v for k, v in tap.items()}
    if plan.clip is not None and modules.question is not None:
        found["question"] = elsewhere(modules.question, "question", plan.clip)
    return found


def build_modules(plan: Plan) -> Modules:
    """The plan's modules on the meta device (constants are real)."""
    with torch.device("meta"):
        vision = plan.family.vision(plan.checkpoint, plan.geometry, plan.taps, plan.in_tower)
        question = None if plan.clip is None else ClipText(text_spec(plan.clip))
        projector = None if plan.compressed else plan.family.projector(plan.checkpoint, plan.geometry)
        reduce = Reduce(plan.before_llm, projector, (*plan.for_reduce, *plan.side), plan.sized, plan.fixed)
        prefill = decode = plan.family.language_model(plan.checkpoint, plan.inside)
        if plan.separate_prefill:
            prefill = plan.family.language_model(plan.checkpoint, plan.inside, prunes=True)
    if plan.profile.precision.kv == "int8":
        for module in (prefill, decode):
            module.int8 = Int8(module.layout)
    return Modules(vision, question, reduce, prefill, decode)


def load_reference(plan: Plan, dtype: torch.dtype = torch.float32) -> Modules:
    """The plan's modules with the checkpoint's weights: the PyTorch reference."""
    modules = build_modules(plan)
    found = origins(plan, modules)
    for file, module in modules.stored().items():
        fill(module, found[file], plan.checkpoint, dtype)
    if modules.prefill is not modules.decode:
        share(modules.decode, modules.prefill)
    return modules


def share(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the very parameters of `source`."""
    for name, parameter in source.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(owner), leaf, parameter)
    target.eval()
