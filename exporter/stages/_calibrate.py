"""Quantisation that looks at activations: the calibration questions run through the language model, one layer of it in memory.

The hidden states of all questions go from layer to layer. Each layer is read from the checkpoint, watched, quantised, written, and
run once more as it was written, so that the next one sees what it will see in the engine. What runs is the model's own prefill with
its reductions: layers behind a cut are calibrated on the tokens that reach them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import exporter.quantize
from exporter import _discover
from exporter.checkpoint import Checkpoint
from exporter.errors import UsageError
from exporter.graphset import PAD, GraphSet
from exporter.nn.decoder import Decoder
from exporter.nn.decoder_layer import Frame, Layer
from exporter.nn.layers import Linear
from exporter.plan import Plan
from exporter.quantize._contract import Quantized, Quantizer, Seen
from exporter.runtime import images
from exporter.runtime.generate import Generator, Timings, Visual
from exporter.runtime.prompt import Prompt
from exporter.runtime.sequence import split
from exporter.stages._modules import Modules, build_modules, origins, share
from exporter.stages._processor import prompt_of
from exporter.stages._reference import reference
from exporter.stages._store import WeightFile
from exporter.stages._task import Question
from exporter.weights import Source, fill
from graphs._contract import Summarizing

Log = Callable[[str], None]
TOKENS = 4096
"""Tokens of the calibration data that a layer runs at once, at least one question's."""
VISION_BATCH = 8
"""Questions that the tower sees at once."""


def quantizer_of(plan: Plan) -> Quantizer:
    found: Quantizer = _discover.load(exporter.quantize, "quantizer", plan.profile.precision.quantizer).QUANTIZER
    return found


def wanted(plan: Plan) -> bool:
    """Whether this plan's weights are quantised by what the calibration data say."""
    precision = plan.profile.precision
    return precision.weights == "int4" and (quantizer_of(plan).calibrated or precision.error_max is not None)


def check(plan: Plan, modules: Modules) -> None:
    """Raises UsageError where there is nothing to calibrate."""
    asked = f"quantizer '{plan.profile.precision.quantizer}'" + (
        "" if quantizer_of(plan).calibrated else " with `error_max`"
    )
    if not isinstance(modules.prefill, Decoder):
        raise UsageError(
            f"The {asked} needs a decoder of ours, and {plan.family.model_type} is traced whole. Choose --quantizer rtn without "
            "`error_max`."
        )
    summarizing = [name for name, method in plan.in_cache if isinstance(method, Summarizing)]
    if summarizing:
        raise UsageError(
            f"The {asked} watches the decoder's layers one by one, and {summarizing[0]} runs them with projections of its own. Choose "
            "--quantizer rtn without `error_max`."
        )
    if plan.checkpoint.quantized:
        raise UsageError(
            f"{plan.checkpoint.folder} is quantised already, so there is nothing for the {asked} to choose. Choose --quantizer rtn, "
            "which keeps its integers, or the checkpoint that is not quantised."
        )


def fingerprint(questions: Sequence[Question]) -> str:
    """What the calibration data are, as one hash."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(question.question.encode())
        digest.update(question.pixels.tobytes())
    return digest.hexdigest()


def calibrate(plan: Plan, weights: WeightFile, questions: Sequence[Question], log: Log = lambda text: None) -> None:
    """Quantise the decoder's layers into `weights`; what is there from before is read back.

    Args:
        questions: the calibration data; their answers do not matter.
    Raises:
        UsageError: no questions, or a plan that cannot be calibrated.
    """
    if not questions:
        raise UsageError("No calibration data: pass --calibration FILE.jsonl.")
    plan = plan.exact()
    with _modules(plan) as (modules, found):
        decoder = modules.prefill
        assert isinstance(decoder, Decoder)
        quantizer = quantizer_of(plan)
        layers = _Layers(
            decoder, weights, quantizer, plan.profile.precision.error_max, found, plan.checkpoint, plan.kept, log
        )
        with layers.streamed():
            generator = Generator(*reference(plan, modules))
            prompt = prompt_of(plan)
            generator.prefill(*inputs(generator, generator.graphs, prompt, questions))


def inputs(
    generator: Generator, graphs: GraphSet, prompt: Prompt, questions: Sequence[Question]
) -> tuple[Visual, list[list[int]]]:
    """What the language model gets to see of the questions, and their prompts."""
    seen, prompts = [], []
    for start in range(0, len(questions), VISION_BATCH):
        some = questions[start : start + VISION_BATCH]
        ids = [prompt.ask(q.question, graphs.visual.placeholders, graphs.visual.media) for q in some]
        pixels = np.concatenate([images.preprocess(q.frames, graphs.image) for q in some])
        side = prompt.side([q.question for q in some])
        seen.append(generator.select(generator.vision(pixels), split(ids, graphs), side, Timings()))
        prompts += ids
    sizes = [v.size for v in seen if v.size is not None]
    signals = {name: torch.cat([torch.as_tensor(v.signals[name]) for v in seen]) for name in seen[0].signals}
    whole = Visual(
        np.concatenate([v.embeds for v in seen]),
        np.concatenate([v.index for v in seen]),
        np.concatenate(sizes) if sizes else None,
        signals,
    )
    return whole, prompts


@contextmanager
def _modules(plan: Plan) -> Iterator[tuple[Modules, dict[str, Source]]]:
    """The plan's modules with all weights but those of the decoder's layers and its head, and where the decoder's come from."""
    modules = build_modules(plan)
    found = origins(plan, modules)
    for file, module in modules.stored().items():
        if file != "llm":
            fill(module, found[file], plan.checkpoint, torch.float32)
    small = {n: s for n, s in found["llm"].items() if not n.startswith(("layers.", "lm_head."))}
    fill(modules.decode, small, plan.checkpoint, torch.float32)
    if modules.prefill is not modules.decode:
        share(modules.decode, modules.prefill)
    yield modules, found["llm"]


@dataclass
class _Layers:
    """Runs a decoder whose layers are not in memory. visual: visual tokens that enter it, in front."""

    decoder: Decoder
    weights: WeightFile
    quantizer: Quantizer
    error_max: float | None
    sources: Mapping[str, Source]
    checkpoint: Checkpoint
    visual: int
    log: Log

    def __post_init__(self) -> None:
        self._orders: dict[int, Tensor] = {}
        self.text = 0

    @contextmanager
    def streamed(self) -> Iterator[None]:
        """Until it is left, the decoder's layers are streamed where they are called."""
        decoder = self.decoder
        changed: list[nn.Module] = [decoder.lm_head]
        decoder.lm_head.forward = lambda x: x.new_zeros(len(x), 1)  # type: ignore[method-assign]  # nobody asks
        for module in decoder.modules():
            if isinstance(module, Frame):
                module.forward = functools.partial(self._frame, module)  # type: ignore[method-assign]
                changed.append(module)
        for i, layer in enumerate(decoder.layers):
            assert isinstance(layer, Layer)
            layer.forward = functools.partial(self._run, i, layer)  # type: ignore[method-assign]
            changed.append(layer)
        for i, ahead in decoder.ahead.items():
            ahead.forward = functools.partial(self._look, i, ahead)  # type: ignore[method-assign]
            changed.append(ahead)
        try:
            yield
        finally:
            for module in changed:
                del module.__dict__["forward"]

    def _frame(self, frame: Frame, x: Tensor, positions: Tensor, order: Tensor, *rest: Any) -> Any:
        """Remember which tokens are padding."""
        if not self._orders:
            self.text = order.shape[1] - self.visual
        self._orders[order.shape[1]] = order
        return Frame.forward(frame, x, positions, order, *rest)

    def _look(self, i: int, ahead: nn.Module, *args: Tensor) -> Any:
        """What a cut in front of layer i sees of it."""
        self._fill(i)
        found = type(ahead).forward(ahead, *args)
        self._drop(i)
        return found

    def _run(self, i: int, layer: Layer, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        self._fill(i)
        self._quantize(i, layer, functools.partial(self._batches, layer, x, rest))
        for name in self._names(i):
            _put(self.decoder, name, self.weights.stored(name))
        read = self._read(i)
        parts: list[list[Tensor]] = []
        for part in self._batches(layer, x, rest):
            parts.append([t if k in read else t.new_zeros(()).expand(t.shape) for k, t in enumerate(part)])
        self._drop(i)
        whole = enumerate(zip(*parts, strict=True))
        return tuple(torch.cat(t) if k in read else t[0][:1].expand(len(x), *t[0].shape[1:]) for k, t in whole)

    def _read(self, i: int) -> Collection[int]:
        """Which of a layer's results anything looks at, besides the next layer. Of the others there are the shapes only: keys and
        values of all layers would be more than the hidden states by far."""
        decoder = self.decoder
        looked_at = i + 1 in decoder.pruned or i in decoder.watch or bool(decoder.evicted) or decoder.probe is not None
        return range(7) if looked_at else (0, 6) if i in decoder.routed else (0,)

    def _quantize(self, i: int, layer: Layer, batches: Callable[[], Iterator[tuple[Tensor, ...]]]) -> None:
        """Write every parameter of a layer. It is watched and quantised only if one of them is not there from before."""

        @functools.cache
        def outcome() -> dict[str, tuple[Quantized | Tensor, dict[str, Any]]]:
            self.log(f"calibrating layer {i + 1} of {len(self.decoder.layers)}")
            return self._decide(i, layer, self._watch(layer, batches))

        for name in self._names(i):
            self.weights.store(name, lambda name=name: outcome()[name])  # type: ignore[misc]

    def _watch(self, layer: Layer, batches: Callable[[], Iterator[tuple[Tensor, ...]]]) -> dict[Linear, Seen]:
        """What enters each matrix, padding left out."""
        seen: dict[Linear, Seen] = {}
        hooks = []

        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(module, Linear)
            seen[module].add(args[0][self._real], self._weights)

        for module in layer.modules():
            if isinstance(module, Linear):
                seen[module] = Seen(len(module.weight), self.quantizer.gram)
                hooks.append(module.register_forward_pre_hook(look))
        for _ in batches():
            pass
        for hook in hooks:
            hook.remove()
        return seen

    def _decide(
        self, i: int, layer: Layer, seen: dict[Linear, Seen]
    ) -> dict[str, tuple[Quantized | Tensor, dict[str, Any]]]:
        """Every parameter of a layer as it will be, and what to note of it."""
        forms = {n: self.weights.quantizable(self.sources[n]) for n in self._names(i)}
        of = {module: name for name, module in self._linears(i, layer).items()}
        for pair in layer.pairs():
            form = forms[of[pair.readers[0]]]
            first = seen[pair.readers[0]]
            if form is None or not first.count:
                continue
            scale = self.quantizer.scale([reader.weight.data for reader in pair.readers], first, form.block)
            if scale is None:
                continue
            for parameter in pair.giver.parameters(recurse=False):
                _put(self.decoder, self._name(parameter), _scaled(parameter.data, pair.columns, 1 / scale))
            for reader in pair.readers:
                _put(self.decoder, f"{of[reader]}", reader.weight.data * scale[:, None])
                seen[reader] = seen[reader].divided(scale)
        found: dict[str, tuple[Quantized | Tensor, dict[str, Any]]] = {}
        parameters = dict(self.decoder.named_parameters())
        linears = self._linears(i, layer)
        for name in self._names(i):
            weight, form = parameters[name].data, forms[name]
            if form is None or name not in linears:
                found[name] = weight, {}
                continue
            watched = seen[linears[name]]
            made = self.quantizer.quantize(weight, form.block, watched)
            before = watched.energy(weight)
            error = watched.energy(made.dequantized() - weight) / before if before else 0.0
            note = {"error": float(f"{error:.3g}")}
            if self.error_max is not None and error > self.error_max:
                self.log(f"{name} stays as it is: INT4 would change its output by {error:.2g} (squared, relative)")
                found[name] = weight, note | {"kept": "error above error_max"}
            else:
                found[name] = made, note
        return found

    def _batches(self, layer: Layer, x: Tensor, rest: Sequence[Tensor | None]) -> Iterator[tuple[Tensor, ...]]:
        """The layer's results, some questions at a time."""
        order = self._orders[x.shape[1]]
        each = max(1, TOKENS // x.shape[1])
        for start in range(0, len(x), each):
            rows = slice(start, start + each)
            self._real = order[rows] != PAD
            self._weights = self._balanced(self._real)
            some = [t if t is None or t.shape[0] != len(x) else t[rows] for t in rest]
            yield Layer.forward(layer, x[rows], *some)  # type: ignore[arg-type]

    def _balanced(self, real: Tensor) -> Tensor:
        """How much each real token counts: all visual ones together as much as all text, of which there is far less, and which is all
        that decoding sees (as in MBQ, Li et al. 2024, arXiv:2412.19509, without its measured sensitivities).

        Args:
            real: bool [batch, seq], visual tokens in front.
        """
        visual = torch.zeros_like(real)
        visual[:, : real.shape[1] - self.text] = True
        visual, text = visual & real, ~visual & real
        weight = torch.where(visual, text.sum() / visual.sum().clamp_min(1), torch.ones(()))
        found: Tensor = weight[real]
        return found

    def _names(self, i: int) -> list[str]:
        return [name for name in self.sources if name.startswith(f"layers.{i}.")]

    def _linears(self, i: int, layer: Layer) -> dict[str, Linear]:
        """Name of the weight → the matrix."""
        found = layer.named_modules()
        return {f"layers.{i}.{n}.weight": m for n, m in found if isinstance(m, Linear)}

    def _name(self, parameter: Tensor) -> str:
        return next(name for name, p in self.decoder.named_parameters() if p is parameter)

    def _fill(self, i: int) -> None:
        for name in self._names(i):
            _put(self.decoder, name, self.sources[name].read(self.checkpoint).float().contiguous())

    def _drop(self, i: int) -> None:
        for name in self._names(i):
            _put(self.decoder, name, torch.empty(self.sources[name].shape, device="meta"))


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _scaled(parameter: Tensor, columns: slice, factor: Tensor) -> Tensor:
    """A vector or matrix with some of its last axis multiplied."""
    found = parameter.clone()
    found[..., columns] *= factor
    return found
