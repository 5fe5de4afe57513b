"""Every family with every method: it fits, and the engine answers as PyTorch does, or it is refused in words.

What fits is asked of all pairs; what answers, of one pair in `SAMPLED`, of the rest in `make test-all`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import exporter.families
from exporter import _discover, methods
from exporter.checkpoint import Checkpoint
from exporter.families._contract import Request
from exporter.stages.export import export
from graphs import _spec
from tests.families import tiny
from tests.stages.conftest import Engine, Exported, plain

FAMILIES, METHODS = _discover.names(exporter.families), _spec.names()
SIZES: dict[str, tuple[int, int]] = {
    "fast_vlm": (128, 192),
    "idefics3": (56, 112), "internvl_chat": (56, 112), "llava_next": (112, 56), "llava_onevision": (56, 112),
    "mistral3": (84, 140), "qwen2_5_vl": (140, 112), "qwen2_vl": (112, 112), "qwen3_vl": (112, 84),
}  # fmt: skip
"""Of images; other families have one of their own."""
SAMPLED = 60
ANSWER = 16
SPLIT = "family"


@dataclass(frozen=True)
class Model:
    folder: Path
    request: Request

    def fit(self, method: str) -> methods.Fit:
        """At half of the tokens, on an image or on a clip, whose frames have the family's own size."""
        found = methods.fit(method, Checkpoint(self.folder), request=self.request)
        return found if found.plan else methods.fit(method, Checkpoint(self.folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Made when they are asked for."""

    class Made(dict[str, Model]):
        def __missing__(self, family: str) -> Model:
            folder = tmp_path_factory.mktemp(family)
            getattr(tiny, family)(folder)
            self[family] = Model(folder, Request(1, SIZES.get(family)))
            return self[family]

    return Made()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_is_refused_in_words(family: str, models: dict[str, Model]) -> None:
    for method in METHODS:
        found = models[family].fit(method)
        assert (found.plan is not None) or len(found.reason.split()) >= 5, f"{method}: {found.reason!r}"


def pairs() -> list[Any]:
    found = []
    for family in FAMILIES:
        for method in METHODS:
            sampled = zlib.crc32(f"{family} {method}".encode()) % SAMPLED == 0
            found.append(pytest.param(family, method, marks=() if sampled else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("family", "method"), pairs())
def test_the_engine_answers_as_pytorch(
    family: str, method: str, models: dict[str, Model], engine: Engine, tmp_path: Path
) -> None:
    model = models[family]
    fit = model.fit(method)
    if fit.plan is None:
        return
    plan = fit.plan
    for step in (s for s in plan.steps if plan.inside.trained[s.name] and _spec.name(s.method) == method):
        asked = _spec.parse(fit.spec)
        file = tiny.weights(step, tmp_path / "weights.safetensors")
        spec = _spec.format(replace(asked, weights=str(file)))
        plan = tiny.plan(model.folder, (spec,), plan.request)
    plan = plain(plan)
    (tmp_path / "graphs").mkdir()
    found = Exported(plan, tmp_path / "graphs", export(plan, tmp_path / "graphs"))
    question = tiny.question(found.graphs)

    def answer(generator: Any) -> Any:
        return generator.generate(question.pixels, [question.prompt], ANSWER, side=question.side)

    ours, theirs = answer(engine(found)), answer(found.theirs())
    assert (ours.index == theirs.index).all()
    assert ours.kept.keys() == theirs.kept.keys()
    for name, kept in theirs.kept.items():
        assert (ours.kept[name] == kept).all()
    assert ours.tokens == theirs.tokens
