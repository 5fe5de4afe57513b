"""Methods inside the language model and in its cache, with every type of decoder: the engine's choices, and its long answer, are
those of an independent loop over Hugging Face's decoder layers, with the method written down again from its paper."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.families._contract import Request
from exporter.plan import Plan
from exporter.runtime.generate import Generator
from exporter.stages._reference import reference
from graphs import _spec
from graphs._contract import InCache, InLLM
from tests.families import hugging_face, tiny
from tests.stages import inside, uncached
from tests.stages.conftest import AXES, Decoded, decoder_of, in_turn

ANSWER = 64
METHODS: dict[str, tuple[str, dict[int, inside.Rule]]] = {
    "fastv": ("fastv:layer=2,keep=4", {2: inside.pruned(inside.looked_at(), {2: 4})}),
    "fastv, without RoPE": ("fastv:layer=2,keep=4,rope=off", {2: inside.pruned(inside.looked_at(False), {2: 4})}),
    "fastv, renumbered": ("fastv:layer=1,keep=6,position=compact", {1: inside.pruned(inside.looked_at(), {1: 6})}),
    "vtw": ("vtw:k=2", {2: inside.pruned(inside.looked_at(), {2: 0})}),
    "vtw, renumbered": ("vtw:k=3,position=compact", {3: inside.pruned(inside.looked_at(), {3: 0})}),
    "pdrop": (
        "pdrop:layer_list=1+3,keep_list=9+4", dict.fromkeys((1, 3), inside.pruned(inside.looked_ahead_at(), {1: 9, 3: 4}))
    ),
    "pdrop, without RoPE": (
        "pdrop:layer_list=1+2+3,keep_list=12+8+3,rope=off,position=keep",
        dict.fromkeys((1, 2, 3), inside.pruned(inside.looked_ahead_at(False), {1: 12, 2: 8, 3: 3})),
    ),
    "vscan_l": ("vscan_l:layer=2,keep=6,rope=on", {2: inside.pruned(inside.looked_ahead_at(), {2: 6})}),
    "vscan_l, without RoPE": ("vscan_l:layer=3,keep=6,rope=off", {3: inside.pruned(inside.looked_ahead_at(False), {3: 6})}),
    "feather": (
        "feather:layer_list=1+3,stride=2,keep_list=10+5", dict.fromkeys((1, 3), inside.feather({1: 10, 3: 5}, 2))
    ),
    "topv": ("topv:layer=2,keep=8,recovery=4", {2: inside.topv(8)}),
    "adatp": ("adatp:layer=2,keep=7,frames=4,segments=2", {2: inside.adatp(7, 4, 2)}),
    "adatp, without RoPE": ("adatp:layer=1,keep=7,frames=4,segments=3,rope=off", {1: inside.adatp(7, 4, 3, False)}),
    "prunevid_l": ("prunevid_l:layer=2,keep=5", {2: inside.pruned(inside.asked_for(False), {2: 5})}),
    "prunevid_l, renumbered": (
        "prunevid_l:layer=2,keep=5,position=compact", {2: inside.pruned(inside.asked_for(False), {2: 5})}
    ),
    "mustdrop_l": (
        "mustdrop_l:layer_list=1+3,keep_list=9+4,ratio=2,key_ratio=0,position=keep",
        dict.fromkeys((1, 3), inside.mustdrop({1: 9, 3: 4}, 2.0, 0)),
    ),
    "mustdrop_l, key tokens, renumbered": (
        "mustdrop_l:layer_list=2+3,keep_list=9+5,ratio=2,key_ratio=0.2",
        dict.fromkeys((2, 3), inside.mustdrop({2: 9, 3: 5}, 2.0, 4)),
    ),
    "prunevid_l, with RoPE": ("prunevid_l:layer=3,keep=5,rope=on", {3: inside.pruned(inside.asked_for(True), {3: 5})}),
    "sparsevlm": (
        "sparsevlm:layer_list=1+2+3,keep_list=12+8+5", dict.fromkeys((1, 2, 3), inside.sparsevlm({1: 12, 2: 8, 3: 5}))
    ),
    "sparsevlm, without RoPE": (
        "sparsevlm:layer_list=1+2+3,keep_list=12+8+5,rope=off",
        dict.fromkeys((1, 2, 3), inside.sparsevlm({1: 12, 2: 8, 3: 5}, False)),
    ),
    "sparsevlm, version 2": (
        "sparsevlm:version=2,layer_list=1+2+3,keep_list=11+7+4,heads=2",
        dict.fromkeys((1, 2, 3), inside.sparsevlm_plus({1: 11, 2: 7, 3: 4}, 2)),
    ),
    "ficoco_l": ("ficoco_l:schedule=0+4+3+3,quantile=0.8", dict.fromkeys((1, 2, 3), inside.ficoco({1: 4, 2: 3, 3: 3}, 0.8))),
    "ficoco_l, without RoPE": (
        "ficoco_l:schedule=0+4+0+5,quantile=0.8,rope=off", dict.fromkeys((1, 3), inside.ficoco({1: 4, 3: 5}, 0.8, rope=False)),
    ),
    "pact": ("pact:layer=2,keep=5,share=0.6,cutoff=0.4", {2: inside.pact(5, 0.6, 0.4)}),
    "pact, without RoPE": ("pact:layer=2,keep=5,share=0.6,cutoff=0.4,rope=off", {2: inside.pact(5, 0.6, 0.4, rope=False)}),
    "llavolta": ("llavolta:layer=2,keep=5", {2: inside.llavolta(5)}),
}  # fmt: skip
"""Method → its spec, and the same from the paper before each layer."""
ELSEWHERE = {"dyrate": "test_dyrate.py", "glimpse": "test_glimpse.py", "pmod": "test_pmod.py"}
ELSEWHERE |= {"voco": "test_voco.py", "vst": "test_vst.py"}
"""What is compared with another loop, as it does more than to choose."""


def capacities(decoder: str) -> list[int]:
    """Of every KV head of four layers."""
    return (
        [1 + 3 * n % 8 for n in range(4 * tiny.text_config(decoder)["num_key_value_heads"])]
        if decoder in tiny.DECODERS
        else [1, 7, 4, 4, 2, 6, 8, 8]
    )


CACHES: dict[str, tuple[Callable[[str], str], Callable[[str], Callable[[int], uncached.Stays]]]] = {
    "lookm": (lambda d: "lookm:keep=3,mode=none", lambda d: lambda layer: inside.received(3)),
    "dycoke_kv": (lambda d: "dycoke_kv:keep=4,layer=1", lambda d: lambda layer: inside.last_looks_at(4)),
    "sparsemm": (
        lambda d: f"sparsemm:capacity_list={'+'.join(map(str, capacities(d)))},kernel=3,window=3",
        lambda d: lambda layer: inside.sparsemm(np.reshape(capacities(d), (4, -1))[layer].tolist(), 3, 3),
    ),
}
"""Method → its spec, and which tokens stay in each layer's cache, for a decoder."""


def fits(method: str, decoder: str) -> bool:
    """Positions of three axes cannot be renumbered."""
    return "renumbered" not in method or decoder not in AXES


def theirs(plan: Plan) -> Any:
    return uncached.load(plan.family.model_type, plan.checkpoint.folder)


@pytest.mark.parametrize(("method", "decoder", "what"), in_turn(METHODS, fits))
def test_inside_the_language_model(method: str, decoder: str, what: str, decoded: Decoded) -> None:
    spec, rules = METHODS[method]
    plan, ours = decoded(decoder, spec, what)
    ((_, fitted),) = plan.in_llm
    question = tiny.question(ours.graphs)
    result = ours.generate(question.pixels, [question.prompt], ANSWER)
    expected, merged = inside.answer(
        theirs(plan), question, ours, rules, ANSWER, counted=fitted.sized, compact=fitted.position == "compact",
        since=fitted.since if fitted.everywhere else None,
    )  # fmt: skip
    assert {name: kept[0].tolist() for name, kept in result.kept.items()} == {
        f"kept_{layer}": made.places for layer, made in merged.items()
    }
    if fitted.merges:
        assert any(((made.weight > 0).sum(1) > 1).any() for made in merged.values()), "nothing was merged"
    assert result.tokens == [expected]
    assert len(set(expected)) > 4, "a model that repeats itself shows nothing"
    if what == "graphs":
        lengths = [result.cache.past[f"past_key_{i}"].shape()[2] for i in range(4)]
        text = len(question.prompt) - ours.graphs.visual.placeholders + ANSWER - 1
        assert lengths == [text + count for count in plan.kv.cached], "the cache is as long as planned"


@pytest.mark.parametrize(("method", "decoder", "what"), in_turn(CACHES))
def test_in_the_cache(method: str, decoder: str, what: str, decoded: Decoded) -> None:
    spec, rules = (make(decoder) for make in CACHES[method])
    plan, ours = decoded(decoder, spec, what)
    ((_, fitted),) = plan.in_cache
    question = tiny.question(ours.graphs)
    result = ours.generate(question.pixels, [question.prompt], ANSWER)
    expected, chosen = uncached.answer_with_short_cache(
        theirs(plan), question, ours, fitted.start, fitted.shared, rules, ANSWER
    )
    found = {int(name.removeprefix("cached_")): kept[0] for name, kept in result.kept.items()}
    assert found.keys() == chosen.keys()
    for layer, kept in found.items():
        heads = kept if kept.ndim == 2 else np.broadcast_to(kept, (len(chosen[layer]), len(kept)))
        assert [row[row >= 0].tolist() for row in heads] == chosen[layer]
    assert result.tokens == [expected]
    assert len(set(expected)) > 4, "a model that repeats itself shows nothing"


def unbounded(mode: str, decoder: str) -> bool:
    """Hugging Face's own cache holds no more than a sliding window."""
    return "sliding_window" not in tiny.DECODERS.get(decoder, {})


@pytest.mark.parametrize(("mode", "decoder", "what"), in_turn(["pivot"], unbounded))
def test_merged_in_the_cache(mode: str, decoder: str, what: str, decoded: Decoded) -> None:
    plan, ours = decoded(decoder, f"lookm:keep=5,mode={mode}", what)
    question = tiny.question(ours.graphs)
    expected = inside.answer_from_merged_cache(theirs(plan), question, ours, 5, ANSWER)
    assert ours.generate(question.pixels, [question.prompt], ANSWER).tokens == [expected]
    assert len(set(expected)) > 4, "a model that repeats itself shows nothing"


def test_every_method_is_compared() -> None:
    named = {spec.partition(":")[0] for spec, _ in METHODS.values()} | {*CACHES, *ELSEWHERE}
    assert named == {n for n in _spec.names() if issubclass(_spec.load(n), InLLM | InCache)}
    for name, file in ELSEWHERE.items():
        assert re.search(rf"\b{name}\b", Path(__file__).with_name(file).read_text())


@pytest.mark.parametrize("decoder", ["llama", "gemma2", "qwen3_vl"])
def test_a_loop_that_merges_nothing_answers_as_hugging_face(decoder: str, tmp_path: Path) -> None:
    """The loop itself: runs of one token are the tokens themselves. And what it says would be without rotation is what the
    layers attend with where nothing is rotated."""
    model = decoder_of(decoder, tmp_path)
    plan = tiny.plan(tmp_path, (), Request(image_size=AXES.get(decoder)))
    runners, graphs, table = reference(plan)
    ours = Generator(runners, tiny.endless(graphs), table)
    question = tiny.question(graphs)
    arguments = hugging_face.arguments(question, graphs)
    model.generation_config.eos_token_id = None
    wanted = model.generate(**arguments, max_new_tokens=16, do_sample=False)
    rules = dict.fromkeys((1, 3), inside.llavolta(plan.kept))
    model = uncached.load(plan.family.model_type, tmp_path)
    compact = decoder not in AXES
    found, merged = inside.answer(model, question, ours, rules, 16, counted=True, compact=compact)
    assert found == wanted[0, arguments["input_ids"].shape[1] :].tolist()
    assert all(np.array_equal(made.weight, np.eye(plan.kept)) for made in merged.values())

    stack, given = uncached.Layers(model), uncached.Given.of(model, question, ours)
    nowhere, order = torch.zeros_like(given.positions), torch.arange(given.prompt)
    with torch.no_grad():
        _, attention = stack.run(1, given.embeds, nowhere, order)
        torch.testing.assert_close(stack.plain(1, given.embeds, nowhere, order).softmax(-1), attention)
