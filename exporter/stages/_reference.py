"""The PyTorch reference as runners: the very modules that were traced, run eagerly in FP32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exporter.backends._contract import Array, Runner
from exporter.graphset import GraphSet, bucket_role
from exporter.plan import Plan
from exporter.stages._describe import describe, reduce_outputs, side_inputs
from exporter.stages._llm import buckets, call_llm, llm_inputs, llm_outputs
from exporter.stages._modules import Modules, load_reference
from exporter.weights import text_embeddings

if TYPE_CHECKING:
    from exporter.nn.traced import LanguageModel

NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64, torch.int8: np.int8,
}  # fmt: skip


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

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._inputs

    @property
    def outputs(self) -> Sequence[str]:
        return self._outputs

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        tensors = {
            k: v if isinstance(v, Tensor) else torch.from_numpy(np.require(v, requirements=("C", "W")))
            for k, v in feeds.items()
        }
        with torch.inference_mode():
            return dict(zip(self._outputs, self._call(tensors), strict=True))

    def numpy(self, value: Any) -> Array:
        return value.numpy() if isinstance(value, Tensor) else np.asarray(value)

    def gather(self, value: Any, rows: npt.NDArray[np.int64]) -> Any:
        return value[torch.from_numpy(rows)] if isinstance(value, Tensor) else value[rows]


def reference(plan: Plan, modules: Modules | None = None) -> tuple[dict[str, Runner], GraphSet, Array]:
    """Runners for all roles, the description of the graphs they stand for, and the embedding table.

    Args:
        modules: with weights; None: the plan's, with keys and values in the cache as they are (`Plan.exact`).
    """
    if modules is None:
        plan = plan.exact()
        modules = load_reference(plan)
    image, frames = plan.geometry.image, plan.geometry.frames
    with torch.inference_mode():
        found = modules.vision(torch.zeros(1, frames, 3, image.height, image.width))
    signals = {name: list(value.shape[1:]) for name, value in zip(plan.taps, found, strict=True)}
    kinds = {name: value.dtype for name, value in zip(plan.taps, found, strict=True) if name in plan.for_reduce}
    files = dict.fromkeys(("vision", "reduce"), "") | {"prefill": "prefill", "decode": "decode"}
    if modules.prefill is modules.decode:
        files["prefill"] = "decode"
    if modules.question is not None:
        files["question"] = ""
    files |= {bucket_role(number): bucket_role(number) for number, _ in enumerate(buckets(plan))}
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
    for number, bucket in enumerate(buckets(plan)):
        inputs = {name: dtype for name, (_, dtype) in bucket.inputs(torch.float32).items()}
        runners[bucket_role(number)] = TorchRunner(bucket.call, inputs, bucket.outputs())
    spec = plan.family.decoder(plan.checkpoint)
    table = text_embeddings(plan.checkpoint.tensor("text.embed_tokens.weight"), spec).float().numpy()
    return runners, graphs, table


def _llm(module: LanguageModel, plan: Plan) -> TorchRunner:
    inputs = {name: dtype for name, (_, dtype) in llm_inputs(plan, module, torch.float32).items()}
    return TorchRunner(lambda v: call_llm(module, v), inputs, llm_outputs(plan, module))
