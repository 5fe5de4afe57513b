"""CLIP's text tower: the question in the space that it shares with CLIP's image tower."""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.nn.atom import Atom
from exporter.nn.layers import MASKED, LayerNorm, Linear
from exporter.nn.specs import ClipTextSpec
from exporter.nn.vit import Block, Table
from graphs._blocks import first, take

EARLY_EOS = 2
"""What old configs call the end-of-text token, wrongly. Then it is the highest id of a question."""


class TextEmbeddings(Atom):
    """Tokens and learned positions. int64 [batch, tokens] → [batch, tokens, hidden]"""

    def __init__(self, spec: ClipTextSpec) -> None:
        super().__init__()
        self.token_embedding = Table(spec.vocab, spec.hidden)
        self.position_embedding = Table(spec.tokens, spec.hidden)
        self.spec = spec

    def key(self) -> Hashable:
        return self.spec

    def forward(self, question_ids: Tensor) -> Tensor:
        return F.embedding(question_ids, self.token_embedding.weight) + self.position_embedding.weight


class CausalBlock(Block):
    """A block whose tokens attend to themselves and those before them. [batch, tokens, hidden] → the same"""

    def forward(self, x: Tensor, size: Tensor | None = None) -> Tensor:  # type: ignore[override]
        place = torch.arange(x.shape[1])
        mask = torch.where(place <= place[:, None], 0.0, MASKED).to(x.dtype)
        x = x + self.self_attn(self.layer_norm1(x), mask)[0]
        return x + self.mlp(self.layer_norm2(x))


class EndOfText(Atom, LayerNorm):
    """The final norm, of the end-of-text token. [batch, tokens, hidden], int64 [batch, tokens] → [batch, hidden]"""

    def __init__(self, spec: ClipTextSpec) -> None:
        super().__init__(spec.hidden, spec.eps)
        self.eos = spec.eos

    def key(self) -> Hashable:
        return self.eps, self.eos

    def forward(self, x: Tensor, question_ids: Tensor) -> Tensor:  # type: ignore[override]
        marked = question_ids if self.eos == EARLY_EOS else question_ids == self.eos
        end = first(marked.to(torch.float32)).unsqueeze(-1)  # ids are whole numbers far below 2^24
        return LayerNorm.forward(self, take(x, end).squeeze(1))


class TextProjection(Atom, Linear):
    """[batch, hidden] → [batch, shared]"""

    def key(self) -> Hashable:
        return tuple(self.weight.shape)


class ClipText(nn.Module):
    """The text tower; parameters named as in transformers, below `text_model`, and `text_projection`."""

    def __init__(self, spec: ClipTextSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = TextEmbeddings(spec)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(CausalBlock(spec) for _ in range(spec.layers))})
        self.final_layer_norm = EndOfText(spec)
        self.text_projection = TextProjection(spec.hidden, spec.shared, bias=False)

    def forward(self, question_ids: Tensor) -> Tensor:
        """question_ids int64 [batch, spec.tokens], each row with its end-of-text token → `aligned_text` [batch, shared]."""
        x = self.embeddings(question_ids)
        layers = self.encoder["layers"]
        assert isinstance(layers, nn.ModuleList)
        for block in layers:
            x = block(x)
        return self.text_projection(self.final_layer_norm(x, question_ids))
