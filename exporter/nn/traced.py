"""transformers' own modules as ours: a tower that gives `hidden`, and a language model with our graphs' inputs and outputs."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Hashable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging

from exporter.errors import CheckpointError
from exporter.kv import KvLayout
from exporter.nn.atom import Atom
from exporter.nn.cache import Int8, opened
from exporter.nn.decoder import Decoder
from exporter.nn.layers import MASKED, Linear
from exporter.nn.specs import DecoderShape


class Seen:
    """What a config makes transformers build; learnt by running it without numbers."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.kind = str(config["model_type"])
        with torch.device("meta"):
            self.model = _without_numbers(config)
        self._check()

    def refuse(self, why: str) -> CheckpointError:
        return CheckpointError(f"There is no family '{self.kind}', and its module cannot be traced: {why}.")

    def _check(self) -> None:
        inner, text = getattr(self.model, "model", None), self.model.config.get_text_config()
        features = getattr(inner, "get_image_features", None)
        if features is None or not hasattr(inner, "language_model"):
            raise self.refuse("it is not a tower whose features take the place of image tokens before a language model")
        wanted = [
            p.name for p in inspect.signature(features).parameters.values()
            if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name != "pixel_values"
        ]  # fmt: skip
        if wanted:
            raise self.refuse(f"it makes tokens not of pixels alone, but of {', '.join(wanted)} too")
        if hasattr(self.model, "create_masks_for_generate"):
            raise self.refuse("some of its tokens see others behind them")
        if hasattr(inner, "get_rope_index"):
            raise self.refuse("its positions have several axes")
        if unknown := set(layer_kinds(text)) - {"full_attention", "sliding_attention"}:
            raise self.refuse(f"it has layers of another kind ({', '.join(sorted(unknown))})")

    @property
    def image_token(self) -> int:
        found = getattr(self.model.config, "image_token_id", None)
        if not isinstance(found, int):
            raise self.refuse("its config names no image token")
        return found

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Of one image of this size."""
        pixels = torch.empty(frames, 3, height, width, device="meta")
        try:
            with torch.no_grad():
                found = features_of(self.model.model, pixels)
        except Exception as e:  # whatever a foreign module raises
            raise self.refuse(f"images of {height} × {width} pixels fail there ({type(e).__name__}: {e})") from e
        if found is None or found.shape[-1] != self.decoder.hidden:
            raise self.refuse("its features are not one sequence of tokens per image")
        return int(found.shape[1])

    @cached_property
    def decoder(self) -> DecoderShape:
        text = self.model.config.get_text_config()
        hidden, cached = int(text.hidden_size), DynamicCache()
        with torch.no_grad():
            places = torch.zeros(1, 2, dtype=torch.int64, device="meta")
            embeds = torch.empty(1, 2, hidden, device="meta")
            logits = self.model(
                inputs_embeds=embeds, attention_mask=masks(self.model, places, places, embeds.dtype), position_ids=places,
                past_key_values=cached, use_cache=True, logits_to_keep=1,
            ).logits  # fmt: skip
        shapes = {tuple(t.shape) for layer in cached.layers for t in (layer.keys, layer.values)}
        if len(shapes) != 1 or len(cached.layers) != text.num_hidden_layers:
            raise self.refuse("its layers keep keys and values of different shapes")
        ((_, kv_heads, _, head_dim),) = shapes
        kinds = layer_kinds(text)
        windows = (int(text.sliding_window) if kind == "sliding_attention" else None for kind in kinds)
        return DecoderShape(
            hidden=hidden, layers=len(cached.layers), heads=int(text.num_attention_heads), kv_heads=kv_heads, head_dim=head_dim,
            intermediate=int(getattr(text, "intermediate_size", 0)), vocab=int(logits.shape[-1]),
            windows=tuple(windows),
        )  # fmt: skip


@cache
def look(config: str) -> Seen:
    """`config`: config.json as it is."""
    return Seen(json.loads(config))


def _without_numbers(config: dict[str, Any]) -> PreTrainedModel:
    made = AutoConfig.for_model(**config)
    found: PreTrainedModel = AutoModelForImageTextToText.from_config(made, attn_implementation="eager")
    return found.eval()


def layer_kinds(text: Any) -> list[str]:
    """What every layer attends to; one kind where the config does not say it for each."""
    found = getattr(text, "layer_types", None)
    windowed = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    return list(found or ["sliding_attention" if windowed else "full_attention"])


def masks(model: PreTrainedModel, order: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """What is added to scores [batch, 1, seq, past + seq], for every kind of layer if there are several. An explicit mask, as
    transformers takes a jump in `position_ids` for the start of another sequence where there is none.

    Args:
        order: int64 [batch, seq], of the queries. seen: int64 [batch, past + seq], of the keys.
    """
    text = model.config.get_text_config()
    queries, keys = order[:, None, :, None], seen[:, None, None, :]
    found = {}
    for kind in dict.fromkeys(layer_kinds(text)):
        visible = keys <= queries
        if kind == "sliding_attention":
            visible = visible & (queries - keys < int(text.sliding_window))
        found[kind] = torch.where(visible, 0.0, MASKED).to(dtype)
    return found if len(found) > 1 else next(iter(found.values()))


def features_of(model: nn.Module, pixels: Tensor) -> Tensor | None:
    """pixels [images, 3, height, width] → [images, tokens, hidden]; None where that is not what comes out."""
    out = model.get_image_features(pixel_values=pixels, return_dict=True)  # type: ignore[operator]
    found = getattr(out, "pooler_output", out)
    if getattr(out, "deepstack_features", None) is not None:
        return None
    if isinstance(found, list | tuple):
        if len({tuple(part.shape) for part in found}) != 1:
            return None
        found = torch.stack(tuple(found))
    if not isinstance(found, Tensor) or found.ndim not in (2, 3):
        return None
    if found.ndim == 2:
        found = found.unflatten(0, (pixels.shape[0], -1))
    return found if found.shape[0] == pixels.shape[0] else None


class Loaded:
    """The module with the weights of a folder.

    Raises:
        CheckpointError: the folder lacks some of them.
    """

    def __init__(self, folder: Path) -> None:
        with torch.device("cpu"), torch.no_grad(), _without_progress():
            model, said = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype="auto",
                attn_implementation="eager",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            if missing := sorted(said["missing_keys"]):
                raise CheckpointError(f"{folder} lacks {len(missing)} tensors, such as `{missing[0]}`.")
            table = model.get_input_embeddings()
            self.embeddings: Tensor = table(torch.arange(table.weight.shape[0]))
        self.parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._hollow = emptied(model.eval())

    def hollow(self) -> PreTrainedModel:
        """Without its weights: parameters are on the meta device, linear layers ours, constants real."""
        return copy.deepcopy(self._hollow)


@contextlib.contextmanager
def _without_progress() -> Iterator[None]:
    """Transformers draws a bar of its own while it loads."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def emptied(model: PreTrainedModel) -> PreTrainedModel:
    """The same without its weights, as `Loaded.hollow` gives it."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                with torch.device("meta"):
                    module.add_module(name, Linear(child.in_features, child.out_features, child.bias is not None))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()
    return model


def only(module: nn.Module, names: Sequence[str], keep: bool) -> nn.Module:
    """A shallow copy with those children alone, or (`keep` false) without them."""
    found = copy.copy(module)
    found._modules = {name: child for name, child in module._modules.items() if (name in names) == keep}
    return found


class Features(Atom):
    """The whole way from pixels to what the language model reads: [batch, frames, 3, height, width] → [batch, frames, tokens, hidden]."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf

    def key(self) -> Hashable:
        return self.hf.config.to_json_string()  # type: ignore[union-attr, operator]

    def forward(self, pixel_values: Tensor) -> Tensor:
        found = features_of(self.hf, pixel_values.flatten(0, 1))
        assert found is not None
        return found.unflatten(0, (-1, pixel_values.shape[1]))


class Vision(nn.Module):
    """pixel_values [batch, frames, 3, height, width] → [`hidden`]"""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.features = Features(only(model.model, ("language_model",), keep=False))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        return [self.features(pixel_values)]


class _GrownLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of the past, told once; asks for no size, as that would settle it for the trace."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def get_seq_length(self) -> int:
        return self.keys.shape[-2]


class Step(Atom):
    """inputs_embeds, position_ids, order, past order, past keys, past values → logits, present keys and values, present order."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf

    def key(self) -> Hashable:
        return str(self.hf.config.to_json_string())

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, order: Tensor, past_order: Tensor, *past: Tensor
    ) -> Any:
        half = len(past) // 2
        cached = Cache(layers=[_GrownLayer(k, v) for k, v in zip(past[:half], past[half:], strict=True)])
        seen = torch.cat([past_order, order], 1)
        logits = self.hf(
            inputs_embeds=inputs_embeds, attention_mask=masks(self.hf, order, seen, inputs_embeds.dtype),
            position_ids=position_ids, past_key_values=cached, use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        presents = [t for layer in cached.layers for t in (layer.keys, layer.values)]
        return (logits[:, -1], *presents, seen)


class TracedDecoder(nn.Module):
    """Takes and gives what `Decoder` does, where nothing is pruned.

    Args:
        visual: visual tokens that enter the language model.
    """

    def __init__(self, model: PreTrainedModel, spec: DecoderShape, visual: int) -> None:
        super().__init__()
        self.spec, self.layers = spec, range(spec.layers)
        self.layout = KvLayout.of(spec.layers, visual, [], [])
        self.int8: Int8 | None = None
        self.kept: list[str] = []
        self.of_tower: tuple[str, ...] = ()
        self.watch: dict[int, Any] = {}
        alone = copy.copy(model)
        alone._modules = model._modules | {"model": only(model.model, ("language_model",), keep=True)}
        self.step = Step(alone)

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, order: Tensor, past_keys: Sequence[Tensor],
        past_values: Sequence[Tensor], past_orders: Sequence[Tensor], *others: Any, past_scales: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:  # fmt: skip
        cache = opened(self.int8, past_keys, past_values, past_scales)
        keys, values = zip(*map(cache.past, self.layers), strict=True)
        logits, *found = self.step(inputs_embeds, position_ids, order, past_orders[0], *keys, *values)
        for layer in self.layers:
            cache.keep(layer, *found[2 * layer : 2 * layer + 2])
        return (logits, *cache.present(), found[-1])


LanguageModel = Decoder | TracedDecoder
"""Ours, or transformers' own."""
