"""The decoder's order of tokens, its masks and its cuts. Parity with Hugging Face: tests/families."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from exporter.graphset import PAD
from exporter.kv import Inside
from exporter.nn.cuts import Cut, Trained
from exporter.nn.decoder import Decoder
from exporter.nn.specs import IN_LLM_SIGNALS, DecoderSpec
from graphs._contract import Reduced, Signals
from graphs.fastv import FastV

SPEC = DecoderSpec(
    hidden=32, layers=4, heads=4, kv_heads=2, head_dim=8, intermediate=48, vocab=40, eps=1e-6, activation="silu",
    qkv_bias=False, output_bias=False, inv_freq=tuple(0.5**i for i in range(4)), rope_scale=1.0, mrope_section=None,
    windows=(None,) * 4, attention_scale=8**-0.5,
)  # fmt: skip
WINDOWED = replace(SPEC, windows=(None, 5, None, 5))
MROPE = replace(SPEC, mrope_section=(1, 1, 2))
QWEN3 = replace(SPEC, qk_norm=True, head_dim=12, inv_freq=tuple(0.5**i for i in range(6)))
GEMMA2 = replace(WINDOWED, post_norms=True, attention_scale=0.2, attention_cap=0.1, logit_cap=0.5)
GEMMA3 = replace(WINDOWED, post_norms=True, attention_scale=0.2, qk_norm=True, local_inv_freq=(1.0, 0.7, 0.5, 0.3))
SPECS = {"plain": SPEC, "windowed": WINDOWED, "mrope": MROPE, "qwen3": QWEN3, "gemma2": GEMMA2, "gemma3": GEMMA3}
VISUAL, TEXT = 6, 5
BEFORE = 2
"""Text tokens before the image."""

FITTED = FastV(layer=2, keep=3)


def decoder(spec: DecoderSpec, reductions: tuple[tuple[str, FastV], ...] = (), visual: int = 0) -> Decoder:
    found, generator = Decoder(spec, Inside(visual, reductions), bool(reductions)), torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return found


def positions(spec: DecoderSpec, order: Tensor) -> Tensor:
    return torch.stack([order, order * 2, order // 2]) if spec.mrope_section else order


def embeds(batch: int, tokens: int) -> Tensor:
    return torch.randn(batch, tokens, SPEC.hidden, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_order_of_tokens_does_not_matter(spec: DecoderSpec) -> None:
    """Visual tokens in front with `order` telling their places: the same logits as the prompt as it stands."""
    module, x = decoder(spec), embeds(2, VISUAL + TEXT)
    order = torch.arange(VISUAL + TEXT).expand(2, -1)
    place = [*range(BEFORE, BEFORE + VISUAL), *range(BEFORE), *range(BEFORE + VISUAL, VISUAL + TEXT)]
    straight = module(x, positions(spec, order), order)[0]
    moved = module(x[:, place], positions(spec, order[:, place]), order[:, place])[0]
    torch.testing.assert_close(moved, straight, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(module(x[:, place], positions(spec, order), order)[0], straight, atol=1e-3)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_padding_changes_nothing(spec: DecoderSpec) -> None:
    module, x = decoder(spec), embeds(1, VISUAL + TEXT)
    order = torch.arange(VISUAL + TEXT)[None]
    padded = torch.cat([x[:, :VISUAL], 9 * embeds(1, 3), x[:, VISUAL:]], 1)
    with_pad = torch.cat([order[:, :VISUAL], torch.full((1, 3), PAD), order[:, VISUAL:]], 1)
    place = torch.where(with_pad == PAD, 0, with_pad)
    expected = module(x, positions(spec, order), order)[0]
    torch.testing.assert_close(module(padded, positions(spec, place), with_pad)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_cache_changes_nothing(spec: DecoderSpec) -> None:
    """In one go, and in two parts with the first part's keys, values and orders handed on."""
    module, x = decoder(spec), embeds(2, 9)
    order = torch.arange(9).expand(2, -1)
    whole = module(x, positions(spec, order), order)
    first, rest = order[:, :6], order[:, 6:]
    _, *presents, total = module(x[:, :6], positions(spec, first), first)
    found = module(x[:, 6:], positions(spec, rest), rest, presents[::2], presents[1::2], [total])
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_windows_hide_what_is_far() -> None:
    """Changing a token out of every window's reach changes nothing; within reach it does."""
    spec = replace(SPEC, layers=1, windows=(5,))
    module, x = decoder(spec), embeds(1, 9)
    order = torch.arange(9)[None]
    expected = module(x, order, order)[0]
    for token, seen in ((3, False), (4, True)):
        changed = x.clone()
        changed[:, token] += 1
        assert torch.allclose(module(changed, order, order)[0], expected, atol=1e-6) != seen


@pytest.mark.parametrize("spec", [SPEC, GEMMA2], ids=["plain", "capped"])
def test_a_cut_keeps_what_the_last_token_looks_at(spec: DecoderSpec) -> None:
    cut, batch, seq = Cut(spec, 2, FITTED, VISUAL, VISUAL, False, Trained({})), 2, VISUAL + TEXT
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(batch, SPEC.heads, seq, SPEC.head_dim, generator=generator)
    key = torch.randn(batch, SPEC.kv_heads, seq, SPEC.head_dim, generator=generator)
    x, order = embeds(batch, seq), torch.arange(seq).expand(batch, -1)
    bias = torch.zeros(batch, 1, SPEC.heads // SPEC.kv_heads * seq, seq)
    seen = (bias, query, key, query, key, None, None)
    found, found_positions, found_order, found_size, index = cut(
        x, x, None, None, None, order + 7, order, order + 0.5, *seen
    )
    for b in range(batch):
        row = torch.zeros(seq)
        for head in range(SPEC.heads):
            scores = key[b, head // 2] @ query[b, head, -1] * spec.attention_scale
            if spec.attention_cap is not None:
                scores = spec.attention_cap * (scores / spec.attention_cap).tanh()
            row += scores.softmax(0) / SPEC.heads
        kept = sorted(row[:VISUAL].topk(3).indices.tolist())
        assert index[b].tolist() == kept
        stays = [*kept, *range(VISUAL, seq)]
        assert torch.equal(found[b], x[b, stays])
        assert found_order[b].tolist() == stays
        assert torch.equal(found_positions[b], found_order[b] + 7)
        assert torch.equal(found_size[b], found_order[b] + 0.5)


def test_a_token_of_size_two_is_two_equal_tokens() -> None:
    """In prefill and in the steps behind it: sizes are part of the cache."""
    module, batch = decoder(SPEC), 2
    x, more = embeds(batch, VISUAL + TEXT), embeds(batch, 1)
    twice = torch.cat([x[:, :1], x], 1)
    order = torch.arange(VISUAL + TEXT).expand(batch, -1)
    orders = torch.cat([order[:, :1], order], 1)
    size = torch.ones(batch, VISUAL + TEXT)
    size[:, 0] = 2
    single = module(x, order, order, size=size)
    double = module(twice, orders, orders)
    torch.testing.assert_close(single[0], double[0])
    past, sizes = {"past_keys": single[1:9:2], "past_values": single[2:9:2], "past_orders": single[9:10]}, single[10:]
    now = order[:, -1:] + 1
    step = module(more, now, now, **past, size=torch.ones(batch, 1), past_sizes=sizes)
    past = {"past_keys": double[1:9:2], "past_values": double[2:9:2], "past_orders": double[9:]}
    torch.testing.assert_close(step[0], module(more, now, now, **past)[0])
    assert torch.equal(step[10], torch.cat([size, torch.ones(batch, 1)], 1))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_groups_have_their_own_lengths(spec: DecoderSpec) -> None:
    module = decoder(spec, (("fastv", FITTED),), VISUAL)
    order = torch.arange(VISUAL + TEXT).expand(2, -1)
    logits, *rest = module(embeds(2, VISUAL + TEXT), positions(spec, order), order)
    presents, orders, kept = rest[: 2 * spec.layers], rest[2 * spec.layers : -1], rest[-1]
    assert module.layout.groups == (0, 0, 1, 1)
    assert logits.shape == (2, spec.vocab)
    assert [p.shape[2] for p in presents[::2]] == [VISUAL + TEXT] * 2 + [3 + TEXT] * 2
    assert [o.shape[1] for o in orders] == [VISUAL + TEXT, 3 + TEXT]
    assert torch.equal(orders[1][:, :3], kept)


@dataclass(frozen=True)
class Recording(FastV):
    """Keeps everything it is told to keep, and what it saw."""

    seen: dict[str, Tensor] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(sorted(IN_LLM_SIGNALS))

    def forward(self, layer: int, signals: Signals) -> Reduced:
        self.seen.update(signals)
        index = torch.arange(VISUAL).expand(len(signals["hidden"]), -1)
        return Reduced(signals["hidden"], index)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_reduction_sees_what_the_layers_attend_with(spec: DecoderSpec, layer: int) -> None:
    """As nothing is dropped, layer l attends as was foreseen: with its own norms, frequencies, window, scale and cap."""
    method = Recording(layer=layer, keep=VISUAL)
    module = decoder(spec, (("fastv", method),), VISUAL)
    found: list[tuple[Any, Any]] = []
    for block in module.layers:
        block.register_forward_hook(lambda _, given, out: found.append((given, out)))
    order = torch.arange(VISUAL + TEXT).expand(2, -1)
    module(embeds(2, VISUAL + TEXT), positions(spec, order), order)

    def row(i: int, rotated: bool = True) -> Tensor:
        return by_head(i, rotated).mean(1)

    def by_head(i: int, rotated: bool = True) -> Tensor:
        (_, _, _, bias, *_), (_, key, _, *queries, plain_key, _) = found[i]
        query, key = (queries[0], key) if rotated else (queries[1], plain_key[:, :, :VISUAL])
        scores = torch.einsum("bhd,bhkd->bhk", query[:, :, -1], key.repeat_interleave(2, 1)) * spec.attention_scale
        if spec.attention_cap is not None:
            scores = spec.attention_cap * (scores / spec.attention_cap).tanh()
        return (scores + (bias[:, :, -1] if rotated else 0)).softmax(-1)[..., :VISUAL]

    _, (_, key, _, _, plain_query, plain_key, _) = found[layer]
    expected = {
        "attention_row": row(layer - 1), "plain_row": row(layer - 1, False), "next_row": row(layer),
        "keys": found[layer - 1][1][1][:, :, :VISUAL], "next_keys": key[:, :, :VISUAL],
        "next_plain_queries": plain_query[:, :, :VISUAL], "next_plain_keys": plain_key[:, :, :VISUAL],
    }  # fmt: skip
    torch.testing.assert_close(method.seen["last_log_attention"].exp(), by_head(layer - 1))
    for name, value in expected.items():
        torch.testing.assert_close(method.seen[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_queries_and_keys_are_normed_before_the_rotation() -> None:
    """Per head, with one weight for all heads."""
    attention = decoder(QWEN3).layers[0].self_attn
    x = embeds(2, 5)
    for found, projection, norm in zip(
        attention.plain(x), attention.qkv_proj.split(x), (attention.q_norm, attention.k_norm), strict=False
    ):
        heads = projection.reshape(2, 5, -1, QWEN3.head_dim)
        expected = norm.weight * heads / (heads.square().mean(-1, keepdim=True) + QWEN3.eps).sqrt()
        torch.testing.assert_close(found, expected.transpose(1, 2))


def test_capped_logits() -> None:
    order, x = torch.arange(9)[None], embeds(1, 9)
    plain = decoder(replace(GEMMA2, logit_cap=None))(x, order, order)[0]
    assert plain.abs().max() > 0.5
    torch.testing.assert_close(decoder(GEMMA2)(x, order, order)[0], 0.5 * (plain / 0.5).tanh())


def test_keeping_everything_is_pruning_nothing() -> None:
    order = torch.arange(VISUAL + TEXT).expand(2, -1)
    x = embeds(2, VISUAL + TEXT)
    pruned = decoder(SPEC, (("fastv", FastV(layer=2, keep=VISUAL)),), VISUAL)(x, order, order)[0]
    torch.testing.assert_close(pruned, decoder(SPEC)(x, order, order)[0])
