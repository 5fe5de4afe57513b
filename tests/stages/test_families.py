"""Every family's graphs in ONNX Runtime: the same tokens kept, the same answers as in PyTorch, with tokens dropped before the
language model, and inside it where its tokens bring more than a vector or see what is behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import exporter.families
from exporter import _discover
from exporter.errors import UsageError
from exporter.families._contract import Request
from exporter.graphset import GraphSet
from exporter.runtime.prompt import Prompt
from exporter.stages.export import export
from exporter.stages.validate import controls
from tests.families import tiny
from tests.families.test_processors import sentence_piece
from tests.stages.conftest import Engine, Exported, objections, plain

BEFORE, BEHIND, INSIDE = "uniform:keep_ratio=0.75", "uniform:keep_ratio=0.75,space=llm", "fastv:layer=1,keep_ratio=0.5"
CASES: dict[str, tuple[Request, tuple[str, ...]]] = {
    "blip_2": (Request(1), ("visionzip:keep_ratio=0.75", INSIDE)),
    "fast_vlm": (Request(1, (128, 192)), ("visionzip:keep_ratio=0.75",)),
    "gemma3": (Request(2), (BEFORE, INSIDE)),
    "idefics3": (Request(1, (56, 112)), (BEFORE,)),
    "instructblip": (Request(1), (BEFORE, INSIDE)),
    "internvl": (Request(2), (BEFORE,)),
    "internvl_chat": (Request(1, (56, 112)), (BEFORE,)),
    "llava_llama": (Request(2), (BEFORE, INSIDE)),
    "llava_next": (Request(2, (112, 56)), (BEFORE,)),
    "llava_next_video": (Request(2), (BEFORE,)),
    "llava_onevision": (Request(3), ("visionzip:keep_ratio=0.75",)),
    "mobilevlm": (Request(2), (BEHIND, INSIDE)),
    "mistral3": (Request(1, (84, 140)), ("visionzip:keep_ratio=0.75",)),
    "paligemma": (Request(1), (BEFORE,)),
    "qwen2_vl": (Request(4, (112, 112)), (BEFORE,)),
    "qwen3_vl": (Request(4, (112, 84)), (BEFORE, INSIDE)),
    "video_llava": (Request(4), ("visionzip:keep_ratio=0.75",)),
    "smolvlm": (Request(2), ("visionzip:keep_ratio=0.75",)),
}
"""What a family is asked for, and what reduces it; those that other tests of this folder export are not here."""
SPLIT = "family"
ELSEWHERE = {"llava", "qwen2_5_vl"}


def test_no_family_is_forgotten() -> None:
    assert set(CASES) | ELSEWHERE == set(_discover.names(exporter.families))


@pytest.mark.parametrize("family", CASES)
def test_onnx_runtime_answers_as_pytorch(family: str, tmp_path: Path, engine: Engine) -> None:
    getattr(tiny, family)(tmp_path)
    compare(tmp_path, *CASES[family], engine)


def test_a_model_without_a_family_is_traced(tmp_path: Path, engine: Engine) -> None:
    tiny.aya_vision(tmp_path)
    said = compare(tmp_path, Request(2), (BEFORE,), engine)
    assert said[0].startswith("warning: there is no family 'aya_vision': transformers' own modules are traced.")


def test_a_model_without_an_image_token(tmp_path: Path, engine: Engine) -> None:
    """From a question's text to an answer's, by what export wrote; and the controls keep as many of what the projector yields."""
    tiny.mobilevlm(tmp_path, vocab_size=310)
    sentence_piece(tmp_path)
    plan = plain(tiny.plan(tmp_path, (BEHIND,), Request(2)))
    (tmp_path / "graphs").mkdir()
    found = Exported(plan, tmp_path / "graphs", export(plan, tmp_path / "graphs"))
    prompt = Prompt.of(found.folder, GraphSet.load(found.folder))
    asked, ids = tiny.question(found.graphs), prompt.ask("What is the cat?", 2)
    assert (ids.count(-200), ids[0]) == (2, 1)
    ours, theirs = (g.generate(asked.pixels, [ids], 8).tokens for g in (engine(found), found.theirs()))
    assert ours == theirs
    assert prompt.decode(ours[0])
    with pytest.raises(UsageError, match=r"token id 310; this model's vocabulary is 0 to 309"):
        engine(found).generate(asked.pixels, [[*ids, 310]], 1)
    assert [(name, control.kept) for name, control in controls(plan)] == [
        ("random, 3 per image", 6), ("uniform, 3 per image", 6),
    ]  # fmt: skip


def compare(checkpoint: Path, request: Request, reductions: tuple[str, ...], engine: Engine) -> list[str]:
    """Answers of the graphs and of the modules they were made of; returns what export said."""
    plan = plain(tiny.plan(checkpoint, reductions, request))
    folder = checkpoint / "graphs"
    folder.mkdir()
    said: list[str] = []
    found = Exported(plan, folder, export(plan, folder, said.append))
    assert [objection for file in found.graphs.roles() for objection in objections(folder / file)] == []
    asked = tiny.question(found.graphs)

    def answer(generator: Any) -> Any:
        return generator.generate(asked.pixels, [asked.prompt], 16, side=asked.side)

    ours, theirs = answer(engine(found)), answer(found.theirs())
    assert plan.kept < plan.geometry.tower.total
    assert (ours.index == theirs.index).all()
    assert ours.tokens == theirs.tokens
    return said
