"""LLM-Viewer's accounting of a Llama: every operator for itself, nothing fused, roofline of each.

Source: Yuan et al. 2024, "LLM Inference Unveiled: Survey and Roofline Model Insights", arXiv:2402.16363, and its program
hahnyuan/LLM-Viewer (`model_analyzer.py`, `configs/Llama.py`), without FlashAttention. Papers on token reduction print its
figures, LFTR and LLaVA-PruMerge among them. Kept as it is: the LM head counts a multiply and an add as one and reads one token; the
activation behind gate and up is `hidden` wide; prefill reads queries as wide as keys; memory holds what all operators of one layer
store, and not the LM head. More than it: layers may have different numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from exporter.cost.accountings._contract import Accounting, Bits, Rates, Reckoned
from exporter.nn.specs import DecoderShape


class _Operator(NamedTuple):
    """Operations, and bytes loaded of weights, loaded otherwise, stored as activations, stored in the cache."""

    operations: float
    weights: float
    loaded: float
    stored: float
    cached: float = 0.0


Layer = Callable[[DecoderShape, int, Bits], Iterator[_Operator]]


def _layer(spec: DecoderShape, seq: int, seen: int, query_heads: int, bits: Bits) -> Iterator[_Operator]:
    """One layer on `seq` tokens that see `seen`."""
    weight, act, cache = bits.weight / 8, bits.activation / 8, bits.cache / 8
    d, wide, narrow = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

    def linear(inputs: int, outputs: int, keeps: bool = False) -> _Operator:
        out = seq * outputs
        return _Operator(
            2 * seq * inputs * outputs, inputs * outputs * weight, seq * inputs * act, 0 if keeps else out * act,
            out * cache if keeps else 0,
        )  # fmt: skip

    yield from (linear(d, wide), linear(d, narrow, True), linear(d, narrow, True), linear(wide, d))
    yield from (linear(d, spec.intermediate), linear(d, spec.intermediate), linear(spec.intermediate, d))
    scores, kept = spec.heads * seq * seen, seen * narrow * cache
    yield _Operator(2 * scores * spec.head_dim, 0, seq * query_heads * spec.head_dim * act + kept, scores * act)
    yield _Operator(2 * scores * spec.head_dim, 0, scores * act + kept, seq * wide * act)
    yield _Operator(5 * scores, 0, scores * act, scores * act)
    for operations, reads in ((7, 1), (7, 1), (1, 1), (1, 1), (2, 2)):  # norms, additions, activation
        yield _Operator(operations * seq * d, 0, reads * seq * d * act, seq * d * act)


def _head(spec: DecoderShape, bits: Bits) -> _Operator:
    act = bits.activation / 8
    size = spec.hidden * spec.vocab
    return _Operator(size, size * bits.weight / 8, spec.hidden * act, spec.vocab * act)


class LlmViewer(Accounting):
    source = "LLM-Viewer, arXiv:2402.16363"
    differs = (
        "It counts every operator for itself: scores, norms and activations go through memory. We take them as fused, count the "
        "vision tower and what a reduction computes, and both halves of the LM head's multiply-adds."
    )

    def prefill(self, spec: DecoderShape, tokens: Sequence[int], bits: Bits, rates: Rates) -> Reckoned:
        layers = [[*_layer(spec, n, n, spec.kv_heads, bits)] for n in tokens]
        return _reckoned(layers, _head(spec, bits), sum(op.cached for layer in layers for op in layer), bits, rates)

    def decode(self, spec: DecoderShape, tokens: Sequence[int], bits: Bits, rates: Rates) -> Reckoned:
        layers = [[*_layer(spec, 1, n, spec.heads, bits)] for n in tokens]
        kept = sum(2 * n * spec.kv_heads * spec.head_dim * bits.cache / 8 for n in tokens)
        return _reckoned(layers, _head(spec, bits), kept, bits, rates)


def _reckoned(layers: list[list[_Operator]], head: _Operator, cache: float, bits: Bits, rates: Rates) -> Reckoned:
    peak = rates.narrow if max(bits.weight, bits.activation, bits.cache) <= 8 else rates.wide
    everything = [*(op for layer in layers for op in layer), head]
    moved = [op.weights + op.loaded + op.stored + op.cached for op in everything]
    return Reckoned(
        sum(op.operations for op in everything),
        sum(moved),
        sum(max(op.operations / peak, b / rates.bandwidth) for op, b in zip(everything, moved, strict=True)),
        sum(op.weights for op in everything[:-1]) + cache + max(sum(op.stored for op in layer) for layer in layers),
    )


ACCOUNTING = LlmViewer()
