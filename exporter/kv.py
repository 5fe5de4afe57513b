"""KV groups: which decoder layers share a cache length and the places of its tokens. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graphs._contract import InCache, InLLM, Skipping, Summarizing


@dataclass(frozen=True)
class Inside:
    """What happens inside a language model.

    visual: visual tokens that enter. in_llm, in_cache: (name, fitted method). trained: name of a method → its own tensors' shapes.
    """

    visual: int = 0
    in_llm: Sequence[tuple[str, InLLM]] = ()
    in_cache: Sequence[tuple[str, InCache]] = ()
    trained: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)

    def layout(self, layers: int) -> KvLayout:
        """Of a decoder of `layers` layers."""
        return KvLayout.of(layers, self.visual, [m for _, m in self.in_llm], [m for _, m in self.in_cache])


@dataclass(frozen=True)
class KvLayout:
    """The cache behind prefill.

    groups: KV group of every layer, ascending from 0. kept: visual tokens in the cache of every group.
    per_head: whether the KV heads of a group keep tokens of their own, so that their places are [batch, kv_heads, past].
    cuts: layers before which tokens leave the language model. entering: visual tokens that take part in every layer of
    prefill, and summaries.
    """

    groups: tuple[int, ...]
    kept: tuple[int, ...]
    per_head: tuple[bool, ...]
    cuts: tuple[int, ...]
    entering: tuple[int, ...]

    @classmethod
    def of(cls, layers: int, visual: int, in_llm: Sequence[InLLM], in_cache: Sequence[InCache]) -> KvLayout:
        """Of a decoder of `layers` layers which `visual` visual tokens enter; the methods are fitted."""
        # from which layer on the cache holds fewer
        dropping = [m for m in in_llm if not isinstance(m, Skipping)]
        shorter = {m.since if m.everywhere else i: m.kept(i) for m in dropping for i in m.layers}
        own: dict[int, InCache | Skipping] = {i: m for m in in_cache for i in range(m.start, layers)}
        own |= {i: m for m in in_llm if isinstance(m, Skipping) for i in m.layers}
        groups: list[int] = []
        kept: list[int] = []
        per_head: list[bool] = []
        entering: list[int] = []
        cuts = {i: m.kept(i) for m in dropping for i in m.layers}
        present, before = visual, None
        for layer in range(layers):
            method = own.get(layer)
            present = shorter.get(layer, present)
            left = cuts.get(layer, entering[-1] if entering else visual)
            entering.append(left)
            alone = isinstance(method, Skipping) or (method is not None and not method.shared)
            if layer == 0 or layer in shorter or alone or method is not before:
                kept.append(present if method is None else method.kept(layer))
                per_head.append(isinstance(method, InCache) and method.per_head)
            groups.append(len(kept) - 1)
            before = method
        routed = {i: m.kept(i) for i, m in own.items() if isinstance(m, Skipping)}
        more = sum(m.kept(0) for m in in_cache if isinstance(m, Summarizing))
        took_part = tuple(routed.get(i, n) + more for i, n in enumerate(entering))
        return cls(tuple(groups), tuple(kept), tuple(per_head), tuple(cuts), took_part)

    def first(self, layer: int) -> bool:
        """Whether a group begins with this layer."""
        return layer == 0 or self.groups[layer] != self.groups[layer - 1]

    @property
    def cached(self) -> tuple[int, ...]:
        """Visual tokens in every layer's cache."""
        return tuple(self.kept[group] for group in self.groups)

    @property
    def lengths(self) -> list[str]:
        """A name for every group's cache length; groups that keep as many tokens have the same."""
        if len(set(self.kept)) == 1:
            return ["past"] * len(self.kept)
        return [f"past_{self.kept.index(count)}" for count in self.kept]
