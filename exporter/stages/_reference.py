"""The PyTorch reference as runners: the very modules that were traced, run eagerly in FP32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.backends._contract import Array, Runner
from exporter.graphset import GraphSet
from exporter.nn.decoder import Decoder
from exporter.plan import Plan
from exporter.stages.export import Modules, describe, llm_outputs, load_reference, reduce_outputs, side_inputs
from exporter.weights import text_embeddings

NUMPY: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}


class TorchRunner(Runner):
    """Calls a function of named tensors. Its device values are torch tensors."""

    def __init__(
        self,
        call: Callable[[dict[str, Tensor]], Sequence[Tensor]],
        inputs: Mapping[str, torch.dtype],
        outputs: Sequence[str],
    ) -> None:
        self._call, self._outputs = call, list(outputs)
        self._inputs = {name: np.dtype(NUMPY[dtype]) for name, dtype in inputs.items()}

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._inputs

    @property
    def outputs(self) -> Sequence[str]:
        return self._outputs

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        tensors = {
            k: v if isinstance(v, Tensor) else torch.from_numpy(np.ascontiguousarray(v)) for k, v in feeds.items()
        }
        with torch.inference_mode():
            return dict(zip(self._outputs, self._call(tensors), strict=True))

    def numpy(self, value: Any) -> Array:
        return value.numpy() if isinstance(value, Tensor) else np.asarray(value)


def reference(plan: Plan, modules: Modules | None = None) -> tuple[dict[str, Runner], GraphSet, Array]:
    """Runners for all roles, the description of the graphs they stand for, and the embedding table."""
    modules = modules or load_reference(plan)
    image, frames = plan.geometry.image, plan.geometry.frames
    with torch.inference_mode():
        found = modules.vision(torch.zeros(1, frames, 3, image.height, image.width))
    signals = {name: list(value.shape[1:]) for name, value in zip(plan.taps, found, strict=True)}
    kinds = {name: value.dtype for name, value in zip(plan.taps, found, strict=True)}
    files = dict.fromkeys(("vision", "reduce"), "") | {"prefill": "prefill", "decode": "decode"}
    if modules.prefill is modules.decode:
        files["prefill"] = "decode"
    if modules.question is not None:
        files["question"] = ""
    graphs = describe(plan, files, signals)
    side = {name: kind or torch.float32 for name, (_, kind) in side_inputs(plan).items()}
    runners: dict[str, Runner] = {
        "vision": TorchRunner(lambda v: modules.vision(v["pixel_values"]), {"pixel_values": torch.float32}, plan.taps),
        "reduce": TorchRunner(
            lambda v: modules.reduce(*(v[n] for n in (*kinds, *side))),
            {**kinds, **side},
            reduce_outputs(plan.sized),
        ),
        "prefill": _llm(modules.prefill, plan),
        "decode": _llm(modules.decode, plan),
    }
    if modules.question is not None:
        question = modules.question
        runners["question"] = TorchRunner(
            lambda v: [question(v["question_ids"])], {"question_ids": torch.int64}, ["aligned_text"]
        )
    spec = plan.family.decoder(plan.checkpoint)
    table = text_embeddings(plan.checkpoint.tensor("text.embed_tokens.weight"), spec).float().numpy()
    return runners, graphs, table


def _llm(module: Decoder, plan: Plan) -> TorchRunner:
    groups, layers = module.groups, plan.geometry.layers
    inputs: dict[str, torch.dtype] = {
        "inputs_embeds": torch.float32,
        "position_ids": torch.int64,
        "order": torch.int64,
    }
    tokens = {"order": torch.int64} | ({"size": torch.float32} if plan.sized else {})
    inputs |= tokens
    if not module.pruned:
        inputs |= {f"past_{kind}_{i}": torch.float32 for kind in ("key", "value") for i in range(layers)}
        inputs |= {f"past_{kind}_{g}": dtype for kind, dtype in tokens.items() for g in range(max(groups) + 1)}

    def call(v: dict[str, Tensor]) -> Sequence[Tensor]:
        past: dict[str, list[Tensor]] = {}
        if not module.pruned:
            past = {f"past_{kind}s": [v[f"past_{kind}_{i}"] for i in range(layers)] for kind in ("key", "value")}
            past |= {f"past_{kind}s": [v[f"past_{kind}_{g}"] for g in range(max(groups) + 1)] for kind in tokens}
        out: Sequence[Tensor] = module(v["inputs_embeds"], v["position_ids"], v["order"], **past, size=v.get("size"))
        return out

    return TorchRunner(call, inputs, llm_outputs(layers, groups, list(module.pruned), plan.sized))
