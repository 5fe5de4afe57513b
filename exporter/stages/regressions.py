"""What got worse: every question with every variant's answer as JSON lines, and pictures of the first that the engine gets wrong
though the unreduced model gets them right."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from PIL import Image

from exporter.errors import UsageError
from exporter.report import overlay
from exporter.runtime import images
from exporter.runtime.generate import Generator
from exporter.runtime.prompt import Prompt
from exporter.stages import curves
from exporter.stages._task import Question
from exporter.stages.validate import Asked, Regression, answered, regressions
from exporter.workspace import Workspace

ANSWERS = "evidence/answers.jsonl"
PICTURES = "evidence/regressions"
SHOWN = 12
"""Regressions with pictures."""
SIDE = 384
"""Longest side of a picture, in pixels."""


def write(
    work: Workspace, found: Sequence[Asked], questions: Sequence[Question], generator: Generator, prompt: Prompt
) -> dict[str, Any]:
    """Into evidence/.

    Returns:
        How many there are by cause, and those with a picture: {"causes": {cause: count}, "shown": [question, cause, file]}.
    """
    lines = [answered(i, question, found) for i, question in enumerate(questions)]
    work.write(ANSWERS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    worse = regressions(found)
    shown = []
    with Workspace(work.evidence).fresh("regressions") as folder:
        for regression in worse[:SHOWN]:
            name = f"{regression.number}.png"
            (folder / name).write_bytes(overlay.png(_picture(questions[regression.number], generator, prompt)))
            shown.append(_entry(regression, questions, found) | {"file": name})
    return {"causes": dict(Counter(r.cause for r in worse)), "shown": shown}


def _entry(regression: Regression, questions: Sequence[Question], found: Sequence[Asked]) -> dict[str, Any]:
    question = questions[regression.number]
    return {
        "number": regression.number,
        "cause": regression.cause,
        "kind": question.kind,
        "question": question.question,
        "expected": question.answer,
        "images": list(question.source),
        "answers": {a.label: a.answers[regression.number] for a in found},
    }


def _picture(question: Question, generator: Generator, prompt: Prompt) -> Image.Image:
    """What was kept of the question's images, drawn on them; the images alone where tokens have no raster."""
    graphs = generator.graphs
    frames = list(question.frames)
    method = " + ".join(r["spec"] for r in graphs.reductions) or "all tokens"
    try:
        ids = prompt.ask(question.question, graphs.visual.placeholders, graphs.visual.media)
        pixels, side = images.preprocess(frames, graphs.image), prompt.side([question.question])
        drawn = curves.picture(generator, pixels, ids, method, side).image
    except UsageError:
        drawn = _strip(frames)
    drawn.thumbnail((SIDE * min(len(frames), 4), SIDE))
    return drawn


def _strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Side by side, as high as the first."""
    height = frames[0].height
    scaled = [images.rgb(f).resize((max(1, round(f.width * height / f.height)), height)) for f in frames]
    strip = Image.new("RGB", (sum(f.width for f in scaled), height))
    left = 0
    for frame in scaled:
        strip.paste(frame, (left, 0))
        left += frame.width
    return strip
