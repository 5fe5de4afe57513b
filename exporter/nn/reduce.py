"""The stage between tower and language model: reductions before the projector, the projector, reductions behind it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from exporter.nn.atom import Atom
from graphs._blocks import take
from graphs._contract import BeforeLLM, Reduced, Signals, Site


class _Method(nn.Module):
    """Gives the reduction's nodes its name in the graph."""

    def __init__(self, method: BeforeLLM) -> None:
        super().__init__()
        self.method = method

    def forward(self, signals: Signals) -> Reduced:
        return self.method.forward(signals)


class Reduce(Atom):
    """visual signals → what the language model reads.

    Args:
        methods: (name, fitted method, its site), in order; those of space "tower" come before those of space "llm".
        projector: tower width → LLM width, or None.
        names: the signals of the vision graph, in order; text embeddings and mask follow when `text_guided`.
        per_frame: tokens of a frame before any reduction; `anchor` counts within a frame.
    """

    def __init__(
        self,
        methods: Sequence[tuple[str, BeforeLLM, Site]],
        projector: nn.Module | None,
        names: Sequence[str],
        text_guided: bool,
        per_frame: int,
    ) -> None:
        super().__init__()
        self.names = (*names, *(("text", "text_mask") if text_guided else ()))
        self.per_frame = per_frame
        self.methods = [(name, method, method.after(site).frames) for name, method, site in methods]
        self.projector = projector
        for name, method, _ in methods:
            self.add_module(name, _Method(method))

    def key(self) -> Hashable:
        shapes = None if self.projector is None else tuple(tuple(p.shape) for p in self.projector.parameters())
        return tuple(self.methods), self.names, self.per_frame, type(self.projector), shapes

    def forward(self, *signals: Tensor) -> tuple[Tensor, Tensor]:
        """Returns visual_embeds [batch, kept, hidden] and index int64 [batch, kept] into the tokens before any reduction."""
        found = dict(zip(self.names, signals, strict=True))
        index = self.first_index(found["hidden"], found.pop("anchor", None))
        projected = False
        for name, method, frames in self.methods:
            if method.space == "llm" and not projected:
                found, projected = self.project(found), True
            out: Reduced = self.get_submodule(name)({k: found[k] for k in method.needs})
            index = torch.where(out.index >= 0, take(index, out.index.clamp_min(0)), -1)
            found = {k: v for k, v in found.items() if k in ("cls", "text", "text_mask")}
            found["hidden"] = out.tokens.unflatten(1, (frames, -1))
        if not projected:
            found = self.project({"hidden": found["hidden"]})
        return found["hidden"].flatten(1, 2), index

    def first_index(self, hidden: Tensor, anchor: Tensor | None) -> Tensor:
        """int64 [batch, frames * tokens]: the place of every token among the tokens before any reduction."""
        frames, tokens = hidden.shape[1:3]
        if anchor is None:
            return torch.zeros_like(hidden[..., 0], dtype=torch.int64).flatten(1) + torch.arange(frames * tokens)
        return (anchor + torch.arange(frames)[None, :, None] * self.per_frame).flatten(1)

    def project(self, signals: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same signals with `hidden` and `cls` at the language model's width."""
        if self.projector is None:
            return signals
        return {k: self.projector(v) if k in ("hidden", "cls") else v for k, v in signals.items()}
