"""The Q-Former of BLIP-2, and InstructBLIP's that reads the question too: a BERT whose queries attend to the image in some
layers.

Names as in the Hugging Face checkpoints, `qformer.…`, `query_tokens` and `language_projection`, unless a method has others.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

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
from graphs._contract import INSTRUCTION_TOKENS, ReductionError, Signals, Site
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

Q = TypeVar("Q", bound="QFormer")
G = TypeVar("G", bound="GuidedQFormer")
EPS, MASKED = 1e-12, -30000.0


@dataclass(frozen=True)
class QFormer(PerFrameCompressor):
    """Queries in, queries out, and a linear layer to the language model's width. The knobs are those of its config.json:
    `queries` num_query_tokens, `layers` num_hidden_layers, `width` hidden_size, `heads` num_attention_heads (None: one per 64
    of the width), `inner` intermediate_size (None: four times the width), `every` cross_attention_frequency."""

    root: ClassVar[str] = "qformer"
    learned: ClassVar[str] = "query_tokens"
    projections: ClassVar[str] = "attention"
    """What holds an attention's query, key and value."""

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

    def layer(self, i: int) -> str:
        return f"{self.root}.encoder.layer.{i}"

    def trained(self, site: Site) -> Shapes:
        return self.encoder_shapes(site) | linear_shapes("language_projection", self.width, site.llm_dim)

    def encoder_shapes(self, site: Site) -> Shapes:
        """Of all that `looked` needs."""
        shapes: Shapes = {self.learned: (1, self.queries, self.width), **self.own_shapes()}
        for i in range(self.layers):
            shapes |= self.attention_shapes(f"{self.layer(i)}.attention", self.width)
            if i % self.every == 0:
                shapes |= self.attention_shapes(f"{self.layer(i)}.crossattention", site.dim)
            shapes |= self.feed_shapes(f"{self.layer(i)}.intermediate_query", f"{self.layer(i)}.output_query")
        return shapes

    def attention_shapes(self, name: str, seen: int) -> Shapes:
        return {
            **linear_shapes(f"{name}.{self.projections}.query", self.width, self.width),
            **linear_shapes(f"{name}.{self.projections}.key", seen, self.width),
            **linear_shapes(f"{name}.{self.projections}.value", seen, self.width),
            **linear_shapes(f"{name}.output.dense", self.width, self.width),
            **norm_shapes(f"{name}.output.LayerNorm", self.width),
        }

    def feed_shapes(self, inner: str, output: str) -> Shapes:
        assert self.inner is not None
        return {
            **linear_shapes(f"{inner}.dense", self.width, self.inner),
            **linear_shapes(f"{output}.dense", self.inner, self.width),
            **norm_shapes(f"{output}.LayerNorm", self.width),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        image = torch.cat([signals["cls"].unsqueeze(1), signals["hidden"]], 1)
        return linear(signals, "language_projection", self.looked(signals, image))

    def looked(self, signals: Signals, image: Tensor) -> Tensor:
        """The queries [n, queries, width] behind the last layer, image [n, tokens, dim]."""
        x, mask = self.embedded(signals)
        for name, crosses in ((self.layer(i), i % self.every == 0) for i in range(self.layers)):
            x = self._attend(signals, f"{name}.attention", x, x, mask)
            queries, text = x[:, : self.queries], x[:, self.queries :]
            if crosses:
                queries = self._attend(signals, f"{name}.crossattention", queries, image)
            x = _feed(signals, f"{name}.intermediate_query", f"{name}.output_query", queries)
            if mask is not None:
                x = torch.cat([x, _feed(signals, f"{name}.intermediate", f"{name}.output", text)], 1)
        return x[:, : self.queries]

    def _attend(self, signals: Signals, name: str, x: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.heads is not None
        given = {"query": x, "key": seen, "value": seen}
        q, k, v = (linear(signals, f"{name}.{self.projections}.{part}", value) for part, value in given.items())
        out = linear(signals, f"{name}.output.dense", attention(q, k, v, self.heads, mask))
        return layer_norm(signals, f"{name}.output.LayerNorm", x + out, EPS)


@dataclass(frozen=True)
class GuidedQFormer(QFormer):
    """The question's words and places go through all layers with the queries. `vocab`, `positions`: vocab_size and
    max_position_embeddings of its config.json."""

    norm: ClassVar[str] = "layernorm"

    vocab: int = 30523
    positions: int = 512

    @property
    def needs(self) -> tuple[str, ...]:
        return (*super().needs, "instruction_ids", "instruction_mask")

    def fitted(self: G, site: Site) -> G:
        if self.positions < INSTRUCTION_TOKENS:
            raise ReductionError(
                f"`positions` must be at least {INSTRUCTION_TOKENS}, a question's length; found {self.positions}"
            )
        return super().fitted(site)

    def own_shapes(self) -> Shapes:
        shapes: Shapes = {
            f"{self.root}.embeddings.word_embeddings.weight": (self.vocab, self.width),
            f"{self.root}.embeddings.position_embeddings.weight": (self.positions, self.width),
            **norm_shapes(f"{self.root}.embeddings.{self.norm}", self.width),
        }
        for name in map(self.layer, range(self.layers)):
            shapes |= self.feed_shapes(f"{name}.intermediate", f"{name}.output")
        return shapes

    def embedded(self, signals: Signals) -> tuple[Tensor, Tensor]:
        ids, real, own = signals["instruction_ids"], signals["instruction_mask"], f"{self.root}.embeddings"
        text = torch.nn.functional.embedding(ids, signals[f"{own}.word_embeddings.weight"])
        text = text + signals[f"{own}.position_embeddings.weight"][:INSTRUCTION_TOKENS]
        x = torch.cat([signals[self.learned].expand(ids.shape[0], -1, -1), text], 1)
        seen = torch.cat([torch.ones_like(real[:, :1]).expand(-1, self.queries), real], 1)
        mask = torch.where(seen > 0, 0.0, MASKED)[:, None, None, :]
        return layer_norm(signals, f"{own}.{self.norm}", x, EPS), mask


def _feed(signals: Signals, inner: str, output: str, x: Tensor) -> Tensor:
    return layer_norm(signals, f"{output}.LayerNorm", x + mlp(signals, f"{inner}.dense", f"{output}.dense", x), EPS)
