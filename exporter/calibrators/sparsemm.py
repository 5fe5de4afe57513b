"""How much each attention head looks at what is being read: the scores by which SparseMM shares out the cache.

The model is given images and the right answers, word by word read from boxes of the image. Where it would say the next token
itself, every head whose highest attention, over all tokens before, is on a visual token in that word's box scores one over
the visual tokens in the box. A question's score is the sum over the answer's tokens.

Source: Wang et al. 2025, "SparseMM: Head Sparsity Emerges from Visual Concept Responses in MLLMs", arXiv:2506.05344, and its
code, whose questions ask for all text of 1000 synthetic documents.
Knobs:
    keep_ratio: of the spec that is printed; the scores do not depend on it.
    among: the tokens that a head has to prefer those of the box to: `all`, or those of the image (`visual`), which tells heads
        apart where most attention goes to text.
Differs: the code lets the model write by itself, and finds the box of a token by its text, in all boxes; here the answer is
given, and every word has its box. Where a model cuts an image into tiles, all tokens that see the box count, those of the
overview too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from exporter.calibrators._boxes import inside
from exporter.calibrators._contract import Calibration, Calibrator, Log, Table
from exporter.calibrators._rollout import Layers, Rollout
from exporter.errors import UsageError
from exporter.plan import Plan
from exporter.runtime.prompt import Prompt
from exporter.stages._task import Box, Question
from graphs._spec import format as spec_of
from graphs.sparsemm import SparseMM as Reduction


@dataclass(frozen=True)
class SparseMM(Calibrator):
    """Score every head of every layer."""

    boxed: ClassVar[bool] = True
    suffix: ClassVar[str] = ".json"

    keep_ratio: float = 0.25
    among: Literal["all", "visual"] = "all"

    @property
    def least(self) -> int:
        return 1

    @property
    def reduction(self) -> str:
        return spec_of(Reduction(keep_ratio=self.keep_ratio))

    def calibrate(self, plan: Plan, questions: Sequence[Question], file: str, log: Log) -> Calibration:
        if plan.request.frames > 1:
            raise UsageError("A box lies in one image: calibrate sparsemm with questions about one, without --frames.")
        if plan.geometry.grid is None:
            raise UsageError("This model's visual tokens have no raster, so nobody can say which ones lie in a box.")
        rollout, each, said, asked = Rollout(plan), [], 0, 0
        for number, question in enumerate(questions, 1):
            log(f"question {number} of {len(questions)}")
            scores, counted, read = self.scores(rollout, question)
            each.append(scores)
            said, asked = said + counted, asked + read
        if not said:
            raise UsageError(
                f"Of {asked} tokens that are read in a box the model would say none by itself, so nothing can be measured. Are these "
                "questions that it can answer, and answers as it writes them?"
            )
        every = torch.stack(each)
        means = every.mean(0)
        content = {
            f"{layer}-{head}": every[:, layer, head].tolist()
            for layer in range(means.shape[0]) for head in range(means.shape[1])
        }  # fmt: skip
        table = Table(
            "Score of every head",
            (">layer", *(f">head {head}" for head in range(means.shape[1]))),
            [(layer, *(f"{score:.3f}" for score in row)) for layer, row in enumerate(means.tolist())],
            f"{len(questions)} questions; {said} of {asked} tokens read in a box, those that the model would say itself.",
        )
        found = {
            "questions": len(questions), "tokens": asked, "counted": said,
            "heads": {name: sum(scores) / len(scores) for name, scores in content.items()},
        }  # fmt: skip
        spec = spec_of(Reduction(keep_ratio=self.keep_ratio, scores=file))
        return Calibration({"": spec}, found, table, (json.dumps(content) + "\n").encode())

    @torch.inference_mode()
    def scores(self, rollout: Rollout, question: Question) -> tuple[Tensor, int, int]:
        """Of one question: float32 [layers, heads]; tokens of its answer that counted, and that are read in a box."""
        batch = rollout.batch([question])
        (image,) = question.frames
        index = batch.index[0].numpy()
        boxes = of_tokens(batch.labels[0].tolist(), question, rollout.prompt)
        steps, seq = len(boxes), batch.order.shape[1]
        tokens = torch.zeros(steps, seq)
        for step, box in enumerate(boxes):
            if box is not None:
                found = torch.from_numpy(inside(box, image.size, rollout.graphs, index))
                if not found.any():
                    raise UsageError(
                        f'"{question.question}": the box {list(box)} holds nothing that the model sees of this image of '
                        f"{image.width} × {image.height} pixels."
                    )
                tokens[step, : len(index)] = found / found.sum()
        layers, rows = Layers(rollout.decoder, batch), []
        x = layers.entered
        for layer in range(rollout.decoder.spec.layers):
            x, seen = layers(layer, x)
            attention = seen.whole_rows(seen.q, seen.k, slice(seq - steps, seq)).flatten(1, 2)[0]  # [heads, steps, seq]
            if self.among == "visual":
                attention = attention[..., : len(index)]
            place = attention.argmax(-1)
            rows.append(tokens.expand(len(place), -1, -1).gather(2, place.unsqueeze(-1)).squeeze(-1))
        logits = rollout.decoder.lm_head(rollout.decoder.norm.every(x[0, -steps:]))
        read = tokens.sum(-1) > 0
        counts = read & (logits.argmax(-1) == batch.labels[0])
        return (torch.stack(rows) * counts).sum(-1), int(counts.sum()), int(read.sum())


def of_tokens(answer: Sequence[int], question: Question, prompt: Prompt) -> list[Box | None]:
    """The box of every token of an answer: that of the word that some of its text belongs to.

    Raises:
        UsageError: the tokens do not read as the answer does.
    """
    ends = [len(prompt.decode(answer[:n]).casefold()) for n in range(len(answer) + 1)]
    text, at = prompt.decode(answer).casefold(), 0
    found: list[Box | None] = [None] * len(answer)
    for word, box in zip(question.answer.split(), question.boxes, strict=True):
        first = text.find(word.casefold(), at)
        if first < 0:
            raise UsageError(f"\"{question.answer}\" reads '{text}' in the model's tokens, so its words have no boxes.")
        at = first + len(word)
        for token in range(len(answer)):
            if ends[token] < at and ends[token + 1] > first:
                found[token] = box
    return found


CALIBRATOR = SparseMM
