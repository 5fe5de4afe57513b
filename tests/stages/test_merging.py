"""Methods that merge inside the language model or in its cache: the engine's long answer is that of an independent loop over Hugging
Face's decoder layers, with the method written down again from its paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.runtime.generate import Generator
from exporter.stages._reference import reference
from exporter.stages.export import export
from tests.families import hugging_face, tiny
from tests.stages import merging, uncached
from tests.stages.conftest import Engine, Exported, plain

ANSWER = 64
METHODS: dict[str, tuple[str, dict[int, merging.Rule], dict[str, Any]]] = {
    "ficoco_l": (
        "ficoco_l:layer=1,keep=6,quantile=0.8", dict.fromkeys((1, 2, 3), merging.ficoco({1: 4, 2: 3, 3: 3}, 0.8)), {},
    ),
    "llavolta": ("llavolta:layer=2,keep=5", {2: merging.llavolta(5)}, {}),
    "pact": (
        "pact:layer=2,keep=5,share=0.6,cutoff=0.4", {2: merging.pact(5, 0.6, 0.4)}, dict(counted=True),
    ),
    "sparsevlm": (
        "sparsevlm:layer_list=1+2+3,keep_list=12+8+5",
        dict.fromkeys((1, 2, 3), merging.sparsevlm({1: 12, 2: 8, 3: 5})), dict(compact=True),
    ),
}  # fmt: skip
"""Method → its spec, the same from the paper before each layer, and how later layers take what it leaves."""
DECODERS = ("llama", "qwen2", "mistral", "qwen3", "gemma2", "opt")
CASES = [
    *(pytest.param(kind, False, id=f"{kind}-pytorch") for kind in DECODERS[:2]),
    *(pytest.param(kind, True, id=f"{kind}-engine", marks=pytest.mark.slow) for kind in DECODERS),
]
"""Decoders, and whether their graphs answer or the modules that those are made of."""


def generator(folder: Path, decoder: str, spec: str, exported: bool, engine: Engine) -> Generator:
    tiny.llava(folder / "model", decoder=decoder)
    plan = plain(tiny.plan(folder / "model", (spec,)))
    if not exported:
        runners, graphs, table = reference(plan)
        return Generator(runners, tiny.endless(graphs), table)
    (folder / "graphs").mkdir()
    return engine(Exported(plan, folder / "graphs", export(plan, folder / "graphs")))


@pytest.mark.parametrize(("decoder", "exported"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_inside_the_language_model(method: str, decoder: str, exported: bool, tmp_path: Path, engine: Engine) -> None:
    spec, rules, how = METHODS[method]
    ours = generator(tmp_path, decoder, spec, exported, engine)
    asked = tiny.question(ours.graphs)
    result = ours.generate(asked.pixels, [asked.prompt], ANSWER)
    model = uncached.load("llava", tmp_path / "model")
    expected, merged = merging.answer(model, asked, ours, rules, ANSWER, **how)
    assert {name: kept[0].tolist() for name, kept in result.kept.items()} == {
        f"kept_{layer}": made.places for layer, made in merged.items()
    }
    assert any(((made.weight > 0).sum(1) > 1).any() for made in merged.values()), "nothing was merged"
    assert result.tokens == [expected]
    assert len(set(expected)) > 4, "a model that repeats itself shows nothing"


@pytest.mark.parametrize(("decoder", "exported"), CASES)
def test_in_the_cache(decoder: str, exported: bool, tmp_path: Path, engine: Engine) -> None:
    ours = generator(tmp_path, decoder, "lookm:keep=5", exported, engine)
    asked = tiny.question(ours.graphs)
    expected = merging.answer_from_merged_cache(uncached.load("llava", tmp_path / "model"), asked, ours, 5, ANSWER)
    assert ours.generate(asked.pixels, [asked.prompt], ANSWER).tokens == [expected]
    assert len(set(expected)) > 4, "a model that repeats itself shows nothing"


def test_a_loop_that_merges_nothing_answers_as_hugging_face(tmp_path: Path) -> None:
    """The loop itself: runs of one token are the tokens themselves."""
    theirs = tiny.llava(tmp_path)
    runners, graphs, table = reference(tiny.plan(tmp_path))
    ours = Generator(runners, tiny.endless(graphs), table)
    asked = tiny.question(graphs)
    arguments = hugging_face.arguments(asked, graphs)
    theirs.generation_config.eos_token_id = None
    wanted = theirs.generate(**arguments, max_new_tokens=16, do_sample=False)[
        0, arguments["input_ids"].shape[1] :
    ].tolist()
    rules = dict.fromkeys((1, 3), merging.llavolta(16))
    found, merged = merging.answer(uncached.load("llava", tmp_path), asked, ours, rules, 16, counted=True, compact=True)
    assert found == wanted
    assert all(np.array_equal(made.weight, np.eye(16)) for made in merged.values())
