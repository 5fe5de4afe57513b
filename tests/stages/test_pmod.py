"""Tokens that skip layers: the engine against PyTorch, and against the official order of operations on Hugging Face's layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporter.errors import UsageError
from tests.families import tiny
from tests.stages import uncached
from tests.stages.conftest import Decoded, Engine, Export, in_turn

ANSWER, LAYERS = 64, (1, 2, 3)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = torch.Generator().manual_seed(0)
    file = tmp_path_factory.mktemp("pmod") / "router.safetensors"
    save_file({"weight": torch.randn(3, 64, generator=draw) * 0.1, "bias": torch.randn(3, generator=draw) * 0.1}, file)
    return file


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_onnx_runtime_equals_pytorch(family: str, router: Path, exported: Export, engine: Engine) -> None:
    case = exported(family, (f"pmod:weights={router}",))
    assert case.graphs.text.groups == [0, 1, 2, 3]
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 1, (20, 21, 22, 23, 24))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    theirs, ours = case.theirs().generate(pixels, prompts, ANSWER), engine(case).generate(pixels, prompts, ANSWER)
    assert ours.tokens == theirs.tokens
    for name, kept in theirs.kept.items():
        assert (ours.kept[name] == kept).all()


@pytest.mark.parametrize(("name", "decoder", "what"), in_turn(["pmod"]))
def test_against_the_official_order_of_operations(
    name: str, decoder: str, what: str, router: Path, decoded: Decoded
) -> None:
    plan, ours = decoded(decoder, f"{name}:weights={router}", what)
    asked = tiny.question(ours.graphs)
    model = uncached.load(plan.family.model_type, plan.checkpoint.folder)
    given = uncached.Given.of(model, asked, ours)
    visual = len(given.visual)
    counts = tuple(int(share * visual) for share in (0.75, 0.25, 0.15))
    assert ours.graphs.text.kept == [visual, *counts]
    expected = loop(uncached.Layers(model), given, counts, load_file(router))
    result = ours.generate(asked.pixels, [asked.prompt], ANSWER)
    assert result.tokens == [expected]
    assert len(set(expected)) > 4, "a model that repeats itself shows nothing"


@torch.no_grad()
def loop(
    stack: uncached.Layers, given: uncached.Given, counts: tuple[int, ...], router: dict[str, Tensor]
) -> list[int]:
    """Greedy tokens, everything anew for every token; what is routed was settled by the prompt alone."""
    embeds, positions, visual = given.embeds, given.positions, given.visual
    tokens: list[int] = []
    while len(tokens) < ANSWER:
        n = embeds.shape[1]
        x, order = stack.entering(embeds, positions), torch.arange(n)
        for i in range(len(stack)):
            kept, weight = torch.ones(n, dtype=torch.bool), torch.ones(n)
            if i in LAYERS:
                row = LAYERS.index(i)
                logits = x[0, visual] @ router["weight"][row] + router["bias"][row]
                kept[visual] = False
                kept[[visual[p] for p in logits.topk(counts[row]).indices.tolist()]] = True
                weight[visual] = torch.tanh(logits) * 0.2 + 1
            out, residual = stack.attended(i, x[:, kept], positions[..., kept], order[kept])
            x = x * weight[:, None]
            x[:, kept] = residual + weight[kept, None] * (out - residual)
            x = given.later(x, i, visual)
        tokens.append(stack.next(x))
        embeds, positions = given.longer(stack, embeds, positions, tokens[-1])
    return tokens


@pytest.mark.parametrize("other", ["fastv:layer=1,keep=4", "lookm:keep=4"])
def test_nothing_else_acts_inside(other: str, router: Path, checkpoints: dict[str, Path]) -> None:
    spec = f"pmod:weights={router}"
    for specs in ((spec, other), (other, spec)):
        with pytest.raises(UsageError, match="Give one of the two"):
            tiny.plan(checkpoints["llava"], specs)
    save_file({"weight": torch.zeros(3, 8), "bias": torch.zeros(3)}, router.with_name("wrong.safetensors"))
    with pytest.raises(UsageError, match=r"does not fit this model. Expected `weight` \[3, 64\] \(found \[3, 8\]\)"):
        tiny.plan(checkpoints["llava"], (f"pmod:weights={router.with_name('wrong.safetensors')}",))
