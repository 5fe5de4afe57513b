"""The Q-Former of BLIP-2 and InstructBLIP: a BERT whose queries attend to the image in some layers.

Names as in the Hugging Face checkpoints, `qformer.…`, `query_tokens` and `language_projection`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from graphs._compressor import (
    PerFrameCompressor,
    Shapes,
    attention,
    heads_of,
    layer_norm,
    linear,
    linear_shapes,
    mlp,
    norm_shapes,
)
from graphs._contract import ReductionError, Signals, Site
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

Q = TypeVar("Q", bound="QFormer")
EPS = 1e-12


@dataclass(frozen=True)
class QFormer(PerFrameCompressor):
    """Queries in, queries out, and a linear layer to the language model's width. The knobs are those of its config.json:
    `queries` num_query_tokens, `layers` num_hidden_layers, `width` hidden_size, `heads` num_attention_heads (None: one per 64
    of the width), `inner` intermediate_size (None: four times the width), `every` cross_attention_frequency."""

    queries: int = 32
    layers: int = 12
    width: int = 768
    heads: int | None = None
    inner: int | None = None
    every: int = 2

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "cls")

    def fitted(self: Q, site: Site) -> Q:
        for knob in ("queries", "layers", "width", "every"):
            if getattr(self, knob) < 1:
                raise ReductionError(f"`{knob}` must be at least 1; found {getattr(self, knob)}")
        inner = 4 * self.width if self.inner is None else self.inner
        return replace(self, heads=heads_of(self.heads, self.width, 64), inner=inner)

    def shape(self, site: Site) -> int:
        return self.queries

    @abstractmethod
    def embedded(self, signals: Signals) -> tuple[Tensor, Tensor | None]:
        """What enters the first layer [n or 1, queries + text, width], queries first, and the mask that is added to the scores
        of its self-attention, float32 [n, 1, 1, queries + text], if there is text."""

    @abstractmethod
    def own_shapes(self) -> Shapes:
        """Of `embedded`, without the queries, and of text in the layers."""

    def trained(self, site: Site) -> Shapes:
        assert self.inner is not None
        shapes: Shapes = {"query_tokens": (1, self.queries, self.width), **self.own_shapes()}
        for i in range(self.layers):
            shapes |= _attention_shapes(f"{_layer(i)}.attention", self.width, self.width)
            if i % self.every == 0:
                shapes |= _attention_shapes(f"{_layer(i)}.crossattention", self.width, site.dim)
            shapes |= self.feed_shapes(f"{_layer(i)}.intermediate_query", f"{_layer(i)}.output_query")
        return shapes | linear_shapes("language_projection", self.width, site.llm_dim)

    def feed_shapes(self, inner: str, output: str) -> Shapes:
        assert self.inner is not None
        return {
            **linear_shapes(f"{inner}.dense", self.width, self.inner),
            **linear_shapes(f"{output}.dense", self.inner, self.width),
            **norm_shapes(f"{output}.LayerNorm", self.width),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        image = torch.cat([signals["cls"].unsqueeze(1), signals["hidden"]], 1)
        x, mask = self.embedded(signals)
        for i in range(self.layers):
            x = self._attend(signals, f"{_layer(i)}.attention", x, x, mask)
            queries, text = x[:, : self.queries], x[:, self.queries :]
            if i % self.every == 0:
                queries = self._attend(signals, f"{_layer(i)}.crossattention", queries, image)
            x = _feed(signals, f"{_layer(i)}.intermediate_query", f"{_layer(i)}.output_query", queries)
            if mask is not None:
                x = torch.cat([x, _feed(signals, f"{_layer(i)}.intermediate", f"{_layer(i)}.output", text)], 1)
        return linear(signals, "language_projection", x[:, : self.queries])

    def _attend(self, signals: Signals, name: str, x: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.heads is not None
        given = {"query": x, "key": seen, "value": seen}
        q, k, v = (linear(signals, f"{name}.attention.{part}", value) for part, value in given.items())
        out = linear(signals, f"{name}.output.dense", attention(q, k, v, self.heads, mask))
        return layer_norm(signals, f"{name}.output.LayerNorm", x + out, EPS)


def _layer(i: int) -> str:
    return f"qformer.encoder.layer.{i}"


def text_layer_shapes(method: QFormer) -> Shapes:
    """Of what text goes through in every layer, where queries have their own."""
    shapes: Shapes = {}
    for i in range(method.layers):
        shapes |= method.feed_shapes(f"{_layer(i)}.intermediate", f"{_layer(i)}.output")
    return shapes


def _attention_shapes(name: str, width: int, seen: int) -> Shapes:
    return {
        **linear_shapes(f"{name}.attention.query", width, width),
        **linear_shapes(f"{name}.attention.key", seen, width),
        **linear_shapes(f"{name}.attention.value", seen, width),
        **linear_shapes(f"{name}.output.dense", width, width),
        **norm_shapes(f"{name}.output.LayerNorm", width),
    }


def _feed(signals: Signals, inner: str, output: str, x: Tensor) -> Tensor:
    return layer_norm(signals, f"{output}.LayerNorm", x + mlp(signals, f"{inner}.dense", f"{output}.dense", x), EPS)
