"""A reduction that goes on while decoding: its engines against PyTorch, and against Hugging Face's layers without a cache."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphs._contract import Site
from graphs.dyrate import DyRate
from tests.families import tiny
from tests.stages import uncached
from tests.stages.conftest import Decoded, Engine, Export, in_turn

ANSWER = 64
LAYER, KEEP, BUCKETS = 2, 12, {3: 7, 20: 2}
SCHEDULE = f"dyrate:layer={LAYER},keep={KEEP},step_list=3+20,keep_list=7+2"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """GRU width → a classifier whose rates depend on the step."""
    found = {}
    for state in (0, 6):
        draw = torch.Generator().manual_seed(4)
        method = DyRate(weights="-", state=state)
        tensors = {n: 4 * torch.randn(s, generator=draw) for n, s in method.trained(Site(16)).items()}
        if not state:  # the more the answer is looked at, the higher the rate
            tensors["weight"] = torch.linspace(-1, 1, 10) * torch.tensor([0.0, 0.0, 0.0, 30.0])[:, None]
            tensors["bias"] = torch.linspace(3, -3, 10)
        found[state] = tmp_path_factory.mktemp("dyrate") / "weights.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, found[state])
    return found


def specs(weights: dict[int, Path]) -> dict[str, str]:
    return {
        "schedule": SCHEDULE,
        "linear": f"{SCHEDULE},weights={weights[0]}",
        "gru": f"{SCHEDULE},weights={weights[6]},state=6",
    }


@pytest.mark.parametrize(
    ("family", "kind"), [("llava", "schedule"), ("llava", "linear"), ("llava", "gru"), ("qwen2_5_vl", "schedule")]
)
def test_onnx_runtime_equals_pytorch(
    family: str, kind: str, weights: dict[int, Path], exported: Export, engine: Engine
) -> None:
    case = exported(family, (specs(weights)[kind],))
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 1, (20, 21, 22, 23, 24))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    theirs, ours = case.theirs().generate(pixels, prompts, ANSWER), engine(case).generate(pixels, prompts, ANSWER)
    assert ours.tokens == theirs.tokens
    assert ours.cache.shrunk is not None and theirs.cache.shrunk is not None
    assert ours.cache.shrunk.cuts == theirs.cache.shrunk.cuts
    if kind == "schedule":
        assert ours.cache.shrunk.cuts == list(BUCKETS.items())
    if kind == "linear":
        assert ours.cache.shrunk.cuts, "a classifier that never cuts shows nothing"
    text = case.graphs.text
    length = {g: ours.cache.past[f"past_order_{g}"].shape()[1] for g in (0, 1)}
    left = ours.cache.shrunk.cuts[-1][1] if ours.cache.shrunk.cuts else KEEP
    assert length[0] - length[1] == text.kept[0] - left


def test_a_shared_schedule_waits_for_every_row(weights: dict[int, Path], exported: Export, engine: Engine) -> None:
    """A batch is cut when all of its rows allow it, and not before."""
    case = exported("llava", (specs(weights)["linear"],))
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 3, (20, 21, 22, 23, 24))]
    ours = engine(case)
    alone = [ours.generate(q.pixels, [q.prompt], ANSWER).cache.shrunk for q in asked]
    both = ours.generate(np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked], ANSWER).cache.shrunk
    assert both is not None
    firsts = [a.cuts[0][0] if a is not None and a.cuts else ANSWER for a in alone]
    assert (both.cuts[0][0] if both.cuts else ANSWER) >= max(firsts)


@pytest.mark.parametrize(("kind", "decoder", "what"), in_turn(["schedule", "linear", "gru"]))
def test_against_a_loop_without_cache(
    kind: str, decoder: str, what: str, weights: dict[int, Path], decoded: Decoded
) -> None:
    """Hugging Face's layers, everything anew for every token: what stays in prefill and at every cut, and with a classifier when
    to cut, is settled here."""
    plan, ours = decoded(decoder, specs(weights)[kind], what)
    asked = tiny.question(ours.graphs)
    result = ours.generate(asked.pixels, [asked.prompt], ANSWER)
    known = {} if kind == "schedule" else load_file(weights[6 if kind == "gru" else 0])
    model = uncached.load(plan.family.model_type, plan.checkpoint.folder)
    expected, cuts = loop(uncached.Layers(model), uncached.Given.of(model, asked, ours), known)
    assert result.cache.shrunk is not None
    assert result.cache.shrunk.cuts == cuts
    assert result.tokens == [expected]


@torch.no_grad()
def loop(
    stack: uncached.Layers, given: uncached.Given, known: dict[str, Tensor]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Greedy tokens, and (answer tokens run, visual tokens left) of every cut. What a token sees from LAYER on was settled when
    it ran. known: the classifier's tensors, or none."""
    embeds, positions, visual = given.embeds, given.positions, given.visual
    tokens: list[int] = []
    chosen: list[list[int]] = []
    cuts: list[tuple[int, int]] = []
    present, state = visual, torch.zeros(6)
    while len(tokens) < ANSWER:
        x, n = stack.entering(embeds, positions), embeds.shape[1]
        row, order = torch.empty(0), torch.arange(n)
        for i in range(len(stack)):
            unseen = torch.zeros(1, n, n, dtype=torch.bool)
            if i == LAYER and not chosen:
                present = best(row, present, KEEP)
                chosen = [present] * given.prompt
            if i >= LAYER:
                for query in range(n):
                    unseen[0, query, [p for p in visual if p not in chosen[query] and p != query]] = True
            x, attention = stack.run(i, x, positions, order, unseen=unseen)
            row = attention.mean(0)[-1] if i == LAYER - 1 else row
            x = given.later(x, i, visual)
        tokens.append(stack.next(x))
        if known:
            parts = (0, visual[0], visual[-1] + 1, given.prompt, n)
            wanted, state = rate(torch.stack([row[a:b].sum() for a, b in pairwise(parts)]), state, known, len(visual))
        for step, keep in list(BUCKETS.items())[len(cuts) :]:
            if (wanted > keep) if known else (n - given.prompt < step):
                break
            present = best(row, present, keep)
            cuts.append((n - given.prompt, keep))
        chosen.append(present)
        embeds, positions = given.longer(stack, embeds, positions, tokens[-1])
    return tokens, cuts


def rate(shares: Tensor, state: Tensor, known: dict[str, Tensor], visual: int) -> tuple[int, Tensor]:
    """Visual tokens that the classifier wants next, and what the GRU remembers."""
    seen = shares
    if "reset" in known:
        reset = torch.sigmoid(torch.cat([shares, state]) @ known["reset"] + known["reset_bias"])
        update = torch.sigmoid(torch.cat([shares, state]) @ known["update"] + known["update_bias"])
        new = torch.tanh(torch.cat([shares, reset * state]) @ known["candidate"] + known["candidate_bias"])
        seen = state = update * state + (1 - update) * new
    return visual - int((seen @ known["weight"] + known["bias"]).argmax()) * visual // 10, state


def best(row: torch.Tensor, present: list[int], keep: int) -> list[int]:
    return sorted(sorted(present, key=lambda p: (-float(row[p]), p))[:keep])
