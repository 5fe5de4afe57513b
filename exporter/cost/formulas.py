"""What a decoder costs, by counting: floating-point operations of prefill and decode, bytes of the cache. No torch.

A multiply and an add are two operations. Attention is counted in full, not its causal half, as the papers do; norms,
rotary embedding, softmax and the LM head are left out, as they do too.
"""

from __future__ import annotations

from collections.abc import Sequence

from exporter.nn.specs import DecoderShape, DecoderSpec


def layer_flops(spec: DecoderSpec, tokens: int) -> int:
    """Of one decoder layer on `tokens` tokens at once. For heads · head_dim = hidden = d and as many KV heads:
    8·n·d² + 6·n·d·m + 4·n²·d; 4·n·d·m where the MLP has no gate."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    projections = 4 * tokens * spec.hidden * (queries + keys)
    mlp = (6 if spec.gated else 4) * tokens * spec.hidden * spec.intermediate
    return projections + mlp + 4 * tokens**2 * queries


def prefill_flops(spec: DecoderSpec, tokens: Sequence[int]) -> int:
    """Of all layers; `tokens`: how many enter each."""
    return sum(layer_flops(spec, n) for n in tokens)


def decode_flops(spec: DecoderSpec, tokens: Sequence[int]) -> int:
    """Of all layers for one token; `tokens`: how many each layer's attention sees, the new one included."""
    one = layer_flops(spec, 1) - 4 * spec.heads * spec.head_dim
    return sum(one + 4 * n * spec.heads * spec.head_dim for n in tokens)


def cache_bytes(spec: DecoderShape, tokens: Sequence[int], each: int) -> int:
    """Keys and values of all layers. `tokens`: how many each layer holds; `each`: bytes of a number."""
    return sum(2 * spec.kv_heads * spec.head_dim * n * each for n in tokens)
