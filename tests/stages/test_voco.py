"""VoCo-LLaMA in two passes of Hugging Face's own model, as its authors run it, against our one prefill and its cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests.families import hugging_face, tiny
from tests.stages import uncached
from tests.stages.conftest import Decoded, Engine, Export, in_turn

ANSWER, TOKEN = 64, 9


@torch.no_grad()
@pytest.mark.parametrize("m", [1, 3])
def test_against_two_passes(m: int, exported: Export, engine: Engine) -> None:
    case = exported("llava", (f"voco:token={TOKEN},m={m}",))
    ours, asked = engine(case), tiny.question(case.graphs)
    model = uncached.load("llava", case.plan.checkpoint.folder)
    text = model.model.language_model
    ids = hugging_face.arguments(asked, ours.graphs)["input_ids"][0].tolist()
    places = [p for p, token in enumerate(ids) if token == ours.graphs.text.image_token]
    first, last = places[0], places[-1] + 1
    assert first > 0, "no text in front shows nothing"
    image = torch.from_numpy(ours.reduce(ours.vision(asked.pixels)).embeds)
    embed = text.embed_tokens
    front, voco, rest = (embed(torch.tensor([part])) for part in (ids[:first], [TOKEN] * m, ids[last:]))

    cache = DynamicCache(config=model.config.text_config)
    seq = torch.cat([front, image, voco], 1)
    text(inputs_embeds=seq, past_key_values=cache, use_cache=True)
    stays = [*range(first), *range(last, last + m)]  # the image goes, what read it stays
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, stays], layer.values[:, :, stays]
    tokens: list[int] = []
    x, position = rest, last + m
    while len(tokens) < ANSWER:
        n, past = x.shape[1], cache.layers[0].keys.shape[2]
        mask = torch.full((n, past + n), torch.finfo(torch.float32).min).triu(past + 1)[None, None]
        out = text(
            inputs_embeds=x, past_key_values=cache, use_cache=True, attention_mask=mask,
            position_ids=torch.arange(position, position + n)[None],
        )  # fmt: skip
        tokens.append(int(model.lm_head(out.last_hidden_state[:, -1]).argmax()))
        x, position = embed(torch.tensor([tokens[-1:]])), position + n
    result = ours.generate(asked.pixels, [asked.prompt], ANSWER)
    assert result.tokens == [tokens]
    assert result.cache.past["past_key_0"].shape()[2] == len(ids) - len(places) + m + ANSWER - 1


@torch.no_grad()
@pytest.mark.parametrize(("name", "decoder", "what"), in_turn(["voco"]))
def test_against_a_loop_without_cache(name: str, decoder: str, what: str, decoded: Decoded) -> None:
    """Hugging Face's layers, everything anew for every token: the special tokens see the image, what is behind them does not."""
    plan, ours = decoded(decoder, f"{name}:token={TOKEN},m=3", what)
    asked = tiny.question(ours.graphs)
    end = max(p for p, token in enumerate(asked.prompt) if token == ours.graphs.text.image_token) + 1
    whole = tiny.Question([*asked.prompt[:end], *[TOKEN] * 3, *asked.prompt[end:]], asked.pixels, asked.side)
    model = uncached.load(plan.family.model_type, plan.checkpoint.folder)
    stack, given = uncached.Layers(model), uncached.Given.of(model, whole, ours)
    embeds, positions, tokens = given.embeds, given.positions, list[int]()
    while len(tokens) < ANSWER:
        x, n = stack.entering(embeds, positions), embeds.shape[1]
        unseen = torch.zeros(1, n, n, dtype=torch.bool)
        unseen[:, given.visual[-1] + 4 :, given.visual] = True
        for layer in range(len(stack)):
            x, _ = stack.run(layer, x, positions, torch.arange(n), unseen=unseen)
            x = given.later(x, layer, given.visual)
        tokens.append(stack.next(x))
        embeds, positions = given.longer(stack, embeds, positions, tokens[-1])
    assert ours.generate(asked.pixels, [asked.prompt], ANSWER).tokens == [tokens]
    assert len(set(tokens)) > 4, "a model that repeats itself shows nothing"


def test_a_batch_is_its_rows(exported: Export, engine: Engine) -> None:
    case = exported("llava", (f"voco:token={TOKEN},m=3",))
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 1, (20, 21, 22, 23, 24))]
    ours = engine(case)
    both = ours.generate(np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked], ANSWER).tokens
    assert both == [ours.generate(q.pixels, [q.prompt], ANSWER).tokens[0] for q in asked]
    assert (
        both
        == case.theirs().generate(np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked], ANSWER).tokens
    )
