"""onnxruntime-genai answers as our own runtime does, with the files that the layout `genai` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.families._contract import Request
from exporter.graphset import GraphSet
from exporter.layouts._write import made, write
from exporter.stages.export import export
from tests.families import tiny
from tests.stages.conftest import Engine, Exported, engine, plain  # noqa: F401

NEW, VOCAB = 12, 96
KEEP, COMPACT = "uniform:keep_ratio=0.75,position=keep", "uniform:keep_ratio=0.75,position=compact"
CASES: dict[str, tuple[str, Request, tuple[str, ...]]] = {
    "gaps": ("llava", Request(1), (KEEP,)),
    "no gaps": ("llava", Request(1), (COMPACT,)),
    "CLS shares a place": ("llava", Request(1), ("visionzip:keep=6,cls=on,position=keep",)),
    "M-RoPE": ("qwen2_5_vl", Request(1, (140, 112)), (KEEP,)),
    "DeepStack": ("qwen3_vl", Request(1, (112, 84)), (KEEP,)),
    "tiles": ("llava_next", Request(1, (112, 56)), (KEEP,)),
    "prompt seen ahead": ("paligemma", Request(1), (KEEP,)),
    "images seen ahead, windows": ("gemma3", Request(2), ()),
    "learned positions": ("blip_2", Request(1), (COMPACT,)),
    "no image token": ("mobilevlm", Request(2), ()),
    "two images in one block": ("mobilevlm", Request(2), ("uniform:keep_ratio=0.75,space=llm,position=compact",)),
}
QUICK = {"gaps", "CLS shares a place", "M-RoPE", "prompt seen ahead", "images seen ahead, windows"}


@pytest.fixture(scope="module")
def og() -> Any:
    found = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed (docs/bundle.md)")
    found.disable_telemetry_events()
    return found


def expanded(prompt: Sequence[int], graphs: GraphSet) -> list[int]:
    """As many image tokens as there are visual ones; in one block at the first, where they are renumbered."""
    visual, found, left = graphs.visual, list[int](), graphs.visual.kept
    share = visual.kept if visual.policy == "compact" else visual.kept // visual.placeholders
    for token in prompt:
        count = min(share, left) if token == graphs.text.image_token else 1
        found += [token] * count
        left -= count if token == graphs.text.image_token else 0
    return found


def answer(og: Any, model: Any, prompt: Sequence[int], pixels: Any, visual: int, beams: int = 1) -> list[int]:
    """What genai says: NEW tokens, or less."""
    inputs = og.NamedTensors()
    inputs["pixel_values"] = pixels
    inputs["num_image_tokens"] = np.array([visual], np.int64)
    inputs["input_ids"] = np.array([prompt], np.int32)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + NEW, num_beams=beams)
    generator = og.Generator(model, parameters)
    generator.set_inputs(inputs)
    while not generator.is_done():
        generator.generate_next_token()
    found: list[int] = generator.get_sequence(0)[len(prompt) :].tolist()
    return found


@pytest.mark.parametrize("flavour", ["plain", "ort"])
@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES])
def test_genai_answers_as_we_do(case: str, flavour: str, og: Any, tmp_path: Path, engine: Engine) -> None:  # noqa: F811
    family, request, reductions = CASES[case]
    getattr(tiny, family)(tmp_path)
    plan = tiny.plan(tmp_path, reductions, request)
    folder = tmp_path / "graphs"
    folder.mkdir()
    plan = plan if flavour == "ort" else plain(plan)
    found = Exported(plan, folder, export(plan, folder))
    asked = [tiny.question(found.graphs, seed, text) for seed, text in ((0, (11, 12, 13)), (1, (14, 15)))]
    ours = [engine(found).generate(q.pixels, [q.prompt], NEW).tokens[0] for q in asked]
    never = next(token for token in range(VOCAB) if not any(token in answer for answer in ours))
    endless = replace(found.graphs, text=replace(found.graphs.text, eos=[never]))
    write(made("genai", endless, folder, plan.profile), folder)
    model = og.Model(str(folder))
    prompts = [expanded(q.prompt, found.graphs) for q in asked]
    theirs = [answer(og, model, p, q.pixels, endless.visual.kept) for p, q in zip(prompts, asked, strict=True)]
    assert theirs == ours
