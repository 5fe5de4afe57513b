"""The stage between tower and language model: reductions before the projector, the projector, reductions behind it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from exporter.nn.atom import Atom
from exporter.nn.layers import add_parameters
from exporter.nn.specs import Fixed
from graphs._blocks import take
from graphs._compressor import Compressor
from graphs._contract import OF_PROMPT, BeforeLLM, Reduced, Site


class _Method(nn.Module):
    """Gives the reduction's nodes its name in the graph."""

    def __init__(self, method: BeforeLLM | Compressor, site: Site) -> None:
        super().__init__()
        self.method, self.site, self.trained = method, site, method.trained(site)
        add_parameters(self, self.trained)

    def forward(self, signals: dict[str, Tensor]) -> Reduced:
        signals = signals | {name: self.get_parameter(name) for name in self.trained}
        if isinstance(self.method, BeforeLLM):
            return self.method.forward(signals)
        tokens = self.method.forward(signals, self.site).flatten(1, 2)
        index = torch.zeros_like(tokens[..., 0], dtype=torch.int64) + torch.arange(tokens.shape[1])
        return Reduced(tokens, index)


class Reduce(Atom):
    """visual signals → what the language model reads.

    Args:
        methods: (name, fitted method, its site), in order; those of space "tower" come before those of space "llm";
            a compressor between them takes the projector's place.
        projector: tower width → LLM width, or None.
        names: what `forward` gets, in order: the signals of the vision graph, then those from elsewhere.
        sized: whether to return the tokens' sizes too.
        fixed: tokens that follow the others, whichever those are.
    """

    def __init__(
        self,
        methods: Sequence[tuple[str, BeforeLLM | Compressor, Site]],
        projector: nn.Module | None,
        names: Sequence[str],
        sized: bool = False,
        fixed: Fixed | None = None,
    ) -> None:
        super().__init__()
        self.fixed = fixed
        self.names, self.sized = tuple(names), sized
        self.methods = [(name, method, method.after(site).frames) for name, method, site in methods]
        self.projector = projector
        for name, method, site in methods:
            self.add_module(name, _Method(method, site))

    def key(self) -> Hashable:
        shapes = None if self.projector is None else tuple(tuple(p.shape) for p in self.projector.parameters())
        return tuple(self.methods), self.names, self.sized, type(self.projector), shapes, self.fixed

    def forward(self, *signals: Tensor) -> tuple[Tensor, ...]:
        """Returns visual_embeds [batch, kept, hidden], index int64 [batch, kept] into the tokens before any reduction (behind a
        compressor: into what it yields), and
        if `sized` the float32 size [batch, kept] of every token. Where the tower gives `deepstack`, its planes stand behind
        each vector: those of a merged token are its anchor's."""
        found = dict(zip(self.names, signals, strict=True))
        planes = found.pop("deepstack", None)
        index = self.first_index(found["hidden"], found.pop("anchor", None))
        size = torch.ones_like(index, dtype=torch.float32)
        projected = False
        class_tokens = {"cls": found["cls"]} if self.fixed is not None and self.fixed.class_tokens else {}
        for name, method, frames in self.methods:
            compresses = isinstance(method, Compressor)
            if isinstance(method, BeforeLLM) and method.space == "llm" and not projected:
                found, projected = self.project(found), True
            out: Reduced = self.get_submodule(name)({k: found[k] for k in method.needs})
            if compresses:
                index, size, projected = out.index, torch.ones_like(out.index, dtype=torch.float32), True
            else:
                came = out.index.clamp_min(0)
                index = torch.where(out.index >= 0, take(index, came), -1)
                size = take(size, came) if out.size is None else out.size
            found = {k: v for k, v in found.items() if (k == "cls" and not compresses) or k in OF_PROMPT}
            found["hidden"] = out.tokens.unflatten(1, (frames, -1))
        if not projected:
            found = self.project({"hidden": found["hidden"]})
        embeds = found["hidden"].flatten(1, 2)
        if planes is not None:
            embeds = torch.cat([embeds, take(planes.flatten(1, 2), index.clamp_min(0))], -1)
        if self.fixed is not None:
            fixed = self.project(class_tokens)["cls"] if class_tokens else self.row_ends(embeds)
            embeds, index, size = self.with_fixed(embeds, index, size, fixed)
        return (embeds, index, *((size,) if self.sized else ()))

    def row_ends(self, embeds: Tensor) -> Tensor:
        """The projector's `image_newline` as often as it is wanted: [batch, fixed, hidden]."""
        assert self.fixed is not None and self.projector is not None
        newline = self.projector.get_parameter("image_newline")
        return (torch.zeros_like(embeds[:, :1]) + newline).expand(-1, self.fixed.placeholders * self.fixed.count, -1)

    def with_fixed(self, embeds: Tensor, index: Tensor, size: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with `fixed` [batch, fixed, hidden] behind, and places that count them behind the tokens of each placeholder."""
        assert self.fixed is not None
        holders, tokens, ends = self.fixed.placeholders, self.fixed.tokens, self.fixed.count
        first = torch.arange(1, holders) * tokens
        before = (index[:, :, None] >= first).to(torch.int64).sum(-1) if holders > 1 else torch.zeros_like(index)
        own = (torch.arange(holders)[:, None] * (tokens + ends) + tokens + torch.arange(ends)).flatten()
        places = torch.zeros_like(index[:, :1]) + own
        sizes = torch.ones_like(places, dtype=torch.float32)
        index = index + before * ends
        return torch.cat([embeds, fixed], 1), torch.cat([index, places], 1), torch.cat([size, sizes], 1)

    def first_index(self, hidden: Tensor, anchor: Tensor | None) -> Tensor:
        """int64 [batch, frames * tokens]: the place of every token among the tokens before any reduction."""
        frames, tokens = hidden.shape[1:3]
        if anchor is None:
            return torch.zeros_like(hidden[..., 0], dtype=torch.int64).flatten(1) + torch.arange(frames * tokens)
        return anchor.flatten(1)

    def project(self, signals: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same signals with `hidden` and `cls` at the language model's width."""
        if self.projector is None:
            return signals
        return {k: self.projector(v) if k.partition("@")[0] in ("hidden", "cls") else v for k, v in signals.items()}
