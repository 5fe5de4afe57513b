"""Whole answers at once, their tokens given, layer by layer through a frozen model.

A token's *step* is its place in the answer: step 0 is the last token of the prompt, which predicts the first token of the
answer. Answers of different length end together; steps before an answer's first are padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from exporter.errors import UsageError
from exporter.graphset import GraphSet
from exporter.nn.decoder import Decoder
from exporter.nn.seen import Attended
from exporter.plan import Plan
from exporter.runtime.generate import Generator
from exporter.runtime.images import preprocess
from exporter.runtime.sequence import arrange, split
from exporter.stages._modules import load_reference
from exporter.stages._processor import prompt_of
from exporter.stages._reference import reference
from exporter.stages._task import Question


@dataclass(frozen=True)
class Batch:
    """Prompts with their answers.

    embeds: [batch, seq, width], visual tokens first, the answer's tokens but the last at the end. order, position_ids, reach:
    int64, as the language model's graphs take them. labels: int64 [batch, steps], -100 in padding. starts: int64
    [batch, 3], as in `exporter.nn.cuts.Watch`. index: int64 [batch, kept], as `reduce` returns it.
    """

    embeds: Tensor
    position_ids: Tensor
    order: Tensor
    reach: Tensor | None
    labels: Tensor
    starts: Tensor
    index: Tensor

    @property
    def real(self) -> Tensor:
        """bool [batch, steps]"""
        return self.labels >= 0

    def text(self) -> Batch:
        """The same without visual tokens."""
        visual = self.index.shape[1]
        return replace(
            self, embeds=self.embeds[:, visual:], position_ids=self.position_ids[..., visual:], order=self.order[:, visual:],
            reach=None if self.reach is None else self.reach[:, visual:], index=self.index[:, :0],
        )  # fmt: skip


class Layers:
    """A decoder's layers over one batch. entered: what enters the first one, [batch, seq, hidden]."""

    def __init__(self, decoder: Decoder, batch: Batch) -> None:
        self._decoder, self._frame = decoder, decoder.frames[0]
        self._visual, self._order = batch.index.shape[1], batch.order
        whole = decoder.planes(batch.embeds) if decoder.spec.planes else (batch.embeds,)
        self.entered: Tensor = whole[0]
        self._planes = whole[1:]
        if decoder.spec.positions:
            self.entered = decoder.embed_positions(self.entered, batch.position_ids)
        _, *self._shared = self._frame(self.entered, batch.position_ids, batch.order, None, None, None, batch.reach)

    def __call__(self, layer: int, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Attended]:
        """What leaves a layer, and what it attended with.

        Args:
            x: [n, seq, hidden], what left the layer before; n may be any multiple of a batch of one. hidden: added to its mask.
        """
        if 0 < layer <= len(self._planes):
            x = self._decoder.add(x, self._planes[layer - 1])
        cos, sin, bias = self._frame.of_layer(layer, self._shared)
        if hidden is not None:
            bias = bias + hidden
        x, key, _, query, *_ = self._decoder.layers[layer](x, cos, sin, bias, None, None)
        return x, Attended(self._decoder.spec, self._visual, query, key, bias, self._order)


class Rollout:
    """A frozen model that runs whole answers. plan: without reductions inside the language model; what acts before it, acts here too."""

    def __init__(self, plan: Plan) -> None:
        modules = load_reference(plan)
        runners, graphs, table = reference(plan, modules)
        assert isinstance(modules.decode, Decoder), "in a language model that is not ours no method here fits"
        self.graphs: GraphSet = graphs
        self.decoder: Decoder = modules.decode
        self.decoder.requires_grad_(False)
        self.visual = plan.kept
        self.prompt = prompt_of(plan)
        self._generator = Generator(runners, graphs, table)
        self._table = torch.from_numpy(np.asarray(table))

    def batch(self, questions: Sequence[Question], answered: bool = True) -> Batch:
        """Prepare questions with their answers, up to an end-of-sequence token; or, if not `answered`, prompts alone, whose one
        step is what comes next."""
        graphs, visual = self.graphs, self.graphs.visual
        pixels = np.concatenate([preprocess(q.frames, graphs.image) for q in questions])
        prompts = [self.prompt.ask(q.question, visual.placeholders, visual.media) for q in questions]
        answers = [self.answer(q) if answered else [graphs.text.eos[0]] for q in questions]
        side = self.prompt.side([q.question for q in questions])
        seen = self._generator.reduce(self._generator.vision(pixels), split(prompts, graphs), side)
        whole = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        text, places = split(whole, graphs), arrange(whole, seen.index, graphs)
        steps = max(map(len, answers))
        labels = torch.full((len(answers), steps), -100)
        order = torch.from_numpy(places.order)
        starts = torch.empty(len(answers), 3, dtype=torch.int64)
        for row, answer in enumerate(answers):
            labels[row, steps - len(answer) :] = torch.tensor(answer)
            image = order[row, : self.visual]
            starts[row] = torch.stack([image.min(), image.max() + 1, order[row, -len(answer)] + 1])
        words = self._table[torch.from_numpy(text.ids)]
        words = torch.nn.functional.pad(words, (0, graphs.text.width - graphs.text.hidden))
        return Batch(
            torch.cat([torch.from_numpy(seen.embeds), words], 1), torch.from_numpy(places.position_ids), order,
            None if places.reach is None else _before(torch.from_numpy(places.reach), order, starts[:, 2:]), labels, starts,
            torch.from_numpy(seen.index),
        )  # fmt: skip

    def answer(self, question: Question) -> list[int]:
        """The tokens of the right answer, as the chat template writes it behind the prompt, with the one that ends it.

        Raises:
            UsageError: it does not write it there.
        """
        visual, eos = self.graphs.visual, self.graphs.text.eos
        messages = self.prompt.question(question.question, visual.placeholders, visual.media)
        before = self.prompt.encode(messages)
        parts = isinstance(messages[-1]["content"], list)
        content = [{"type": "text", "text": question.answer}] if parts else question.answer
        whole = self.prompt.encode([*messages, {"role": "assistant", "content": content}], answer=False)
        if whole[: len(before)] != before:
            raise UsageError(
                "This checkpoint's chat template does not write an answer behind the prompt that asks for it, so there is "
                "nothing to learn from."
            )
        answer = whole[len(before) :]
        ends = [place for place, token in enumerate(answer) if token in eos]
        return answer[: ends[0] + 1] if ends else [*answer, eos[0]]


def _before(reach: Tensor, order: Tensor, answer: Tensor) -> Tensor:
    """A prompt sees nothing of its answer, and an answer looks back only. answer: int64 [batch, 1], order of its first token."""
    return torch.where(order < answer, torch.minimum(reach, answer - 1), order)
