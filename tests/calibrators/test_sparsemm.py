"""The scores of heads: what Hugging Face's attention maps say, and that the trained model has heads that look there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.calibrators.sparsemm import SparseMM, of_tokens
from exporter.embedded import CHECKPOINT, digits, evaluate
from exporter.errors import UsageError
from exporter.job import Job
from exporter.runtime.prompt import Prompt
from exporter.stages import _task
from exporter.stages._task import Box, Question
from graphs import _spec
from graphs._contract import Site
from tests.calibrators.conftest import ask
from tests.families import tiny

QUARTER = [2, 3, 6, 7]
"""Of 4 × 4 tokens, the upper right ones."""


def quiet(text: str) -> None: ...


@pytest.mark.parametrize("among", ["all", "visual"])
@pytest.mark.parametrize("decoder", ["llama", "gemma3_text"])
def test_scores(decoder: str, among: Any, tmp_path: Path) -> None:
    """Of an answer of the model's own, word by word from a box or from none."""
    first = ask(tiny.llava(tmp_path, decoder=decoder), tmp_path, None, "w20", answered=False)
    with torch.inference_mode():
        said = first.theirs.generate(**first.arguments, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    words = [f"w{token}" for token in said]
    boxes: list[Box | None] = [(60, 0, 120, 45)] * 5 + [None]
    # the third word is another one than the model would say, which the rest of its answer does not show
    words[2] = "w90"
    tokens = [*said[:2], 90, *said[3:]]
    whole: Box = (0, 0, 120, 90)
    question = Question(
        "custom",
        [first.question.frames[0].resize((120, 90))],
        first.question.question,
        " ".join(words),
        boxes=(*boxes[:4], whole, None),
    )
    found, counted, read = SparseMM(among=among).scores(first.rollout, question)

    ids = torch.cat([first.arguments["input_ids"], torch.tensor([tokens[:-1]])], 1)
    image = (ids[0] == tiny.IMAGE).nonzero()[:, 0]
    pixels = first.arguments["pixel_values"]
    with torch.inference_mode():
        out = first.theirs(input_ids=ids, pixel_values=pixels, output_attentions=True)
    expected, right = torch.zeros(found.shape), 0
    for step in range(5):
        row = ids.shape[1] - 6 + step
        if int(out.logits[0, row].argmax()) != tokens[step]:
            continue
        right += 1
        box = set((image if step == 4 else image[QUARTER]).tolist())
        for layer, attention in enumerate(out.attentions):
            for head, weights in enumerate(attention[0, :, row]):
                seen = weights if among == "all" else torch.where(ids[0] == tiny.IMAGE, weights, -1)
                expected[layer, head] += (int(seen.argmax()) in box) / len(box)
    assert read == 5 and counted == right and 2 <= right < 5
    torch.testing.assert_close(found, expected)
    assert found.any()


def by_transformers(examples: list[digits.Example], whole: bool) -> dict[str, float]:
    """ "layer-head" → share of questions in which it looks at the cell, of 2 × 2 of 8 × 8 tokens, and the answer is right."""
    model, processor = evaluate.load(CHECKPOINT)
    model.set_attn_implementation("eager")
    inputs: Any = processor(
        text=[evaluate.prompt(processor, e) for e in examples], images=[list(e.frames) for e in examples], padding=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.inference_mode():
        out = model(**inputs, output_attentions=True)
    answers = processor.batch_decode(out.logits[:, -1:].argmax(-1))
    hits: dict[str, float] = {f"{layer}-{head}": 0 for layer in range(4) for head in range(4)}
    for row, example in enumerate(examples):
        if answers[row].strip() != example.answer:
            continue
        shown = inputs["input_ids"][row] == model.config.image_token_index
        assert example.box is not None
        column, line = example.box[0] // 8, example.box[1] // 8
        cell = {int(shown.nonzero()[8 * (line + i) + column + j]) for i in (0, 1) for j in (0, 1)}
        for layer, attention in enumerate(out.attentions):
            for head, weights in enumerate(attention[row, :, -1]):
                looked = weights if whole else torch.where(shown, weights, -1)
                hits[f"{layer}-{head}"] += int(looked.argmax()) in cell
    return {name: count / len(examples) for name, count in hits.items()}


@pytest.mark.parametrize("among", ["all", "visual"])
def test_the_embedded_model_s_heads(among: Any) -> None:
    """A cell is four tokens: a hit scores a quarter."""
    examples = digits.held_out("cell", 12)
    questions = [q for q in _task.embedded(1, 12) if q.kind == "cell"]
    plan = Job("embedded", (), "cpu_fp32").plan()
    found = SparseMM(among=among).calibrate(plan, questions, "heads.json", quiet)
    expected = by_transformers(examples, among == "all")
    assert found.found["heads"] == pytest.approx({name: share / 4 for name, share in expected.items()})
    assert max(expected.values()) >= 0.8 and min(expected.values()) <= 0.2
    assert found.found["questions"] == found.found["tokens"] == 12


def test_heads_that_look_at_what_is_asked_get_more_of_the_cache(tmp_path: Path) -> None:
    questions = [q for q in _task.for_calibration(1, 16) if q.boxes]
    plan = Job("embedded", (), "cpu_fp32").plan()
    path = tmp_path / "heads.json"
    found = SparseMM(keep_ratio=0.5).calibrate(plan, questions, str(path), quiet)
    assert found.content is not None
    path.write_bytes(found.content)
    assert {len(scores) for scores in json.loads(found.content).values()} == {len(questions)}
    site = Site(64, signals=frozenset({"head_attention", "behind"}), depth=4, kv_heads=2)
    method = _spec.parse(found.specs[""]).fit(site)
    rooms = {(layer, head): method.capacities(layer)[head] for layer in range(4) for head in range(2)}
    heads = found.found["heads"]
    seen = {(i, j): heads[f"{i}-{2 * j}"] + heads[f"{i}-{2 * j + 1}"] for i, j in rooms}
    assert sum(rooms.values()) == 8 * 32
    assert rooms[max(seen, key=seen.__getitem__)] == max(rooms.values()) > 32
    assert rooms[min(seen, key=seen.__getitem__)] == min(rooms.values()) < 32


def test_words_of_several_tokens() -> None:
    class Letters(Prompt):
        """One letter a token, spaces too; 0 ends."""

        def __init__(self) -> None: ...

        def decode(self, ids: Any) -> str:
            return "".join(chr(i) for i in ids if i)

    a, b = (0, 0, 1, 1), (2, 2, 3, 3)
    question = Question("custom", [], "", "ab c D", boxes=(a, None, b))
    assert of_tokens([*map(ord, " ab c d"), 0], question, Letters()) == [None, a, a, None, None, None, b, None]
    with pytest.raises(UsageError, match='"ab c D" reads'):
        of_tokens([*map(ord, "ab d")], question, Letters())


def refused(question: Question, frames: int = 1) -> str:
    with pytest.raises(UsageError) as e:
        SparseMM().calibrate(Job("embedded", (), "cpu_fp32", frames).plan(), [question], "", quiet)
    return str(e.value)


def test_refusals(tmp_path: Path) -> None:
    (good,) = (q for q in _task.for_calibration(1, 2) if q.boxes)
    box: Box = (900, 900, 910, 910)
    outside = Question("custom", good.frames, good.question, good.answer, boxes=(box,))
    assert "holds nothing that the model sees of this image of 64 × 64 pixels" in refused(outside)
    wrong = Question(
        "custom", [Image.fromarray(np.zeros((64, 64, 3), np.uint8))], good.question, "two", boxes=((0, 0, 9, 9),)
    )
    assert "Of 1 tokens that are read in a box the model would say none by itself" in refused(wrong)
    assert "A box lies in one image" in refused(good, frames=4)
    tiny.blip_2(tmp_path)
    with pytest.raises(UsageError, match="no raster"):
        SparseMM().calibrate(tiny.plan(tmp_path), [good], "", quiet)
