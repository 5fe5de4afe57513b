"""A whole answer at once, its tokens given: what every token looks at, and the logits when each one sees fewer visual tokens.

A token's *step* is its place in the answer: step 0 is the last token of the prompt, which predicts the first token of the
answer. Answers of different length end together; steps before an answer's first are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exporter.errors import UsageError
from exporter.graphset import GraphSet
from exporter.nn.cuts import group_shares
from exporter.nn.decoder import Decoder
from exporter.nn.seen import Attended
from exporter.plan import Plan
from exporter.runtime.generate import Generator
from exporter.runtime.images import preprocess
from exporter.runtime.sequence import arrange, split
from exporter.stages._modules import load_reference
from exporter.stages._processor import prompt_of
from exporter.stages._task import Question

Keep = Callable[[Tensor, Tensor], Tensor]
"""(shares [batch, steps, 4], rank of every visual token int64 [batch, steps, tokens], 0 for the one looked at most) → how
much of each visual token a step sees: float32 [batch, steps, tokens], 0 to 1."""


@dataclass(frozen=True)
class Batch:
    """Prompts with their answers.

    embeds: [batch, seq, hidden], visual tokens first, the answer's tokens but the last at the end. order, position_ids:
    int64, as the language model's graphs take them. labels: int64 [batch, steps], -100 in padding. starts: int64
    [batch, 3], as in `exporter.nn.cuts.Watch`.
    """

    embeds: Tensor
    position_ids: Tensor
    order: Tensor
    labels: Tensor
    starts: Tensor

    @property
    def real(self) -> Tensor:
        """bool [batch, steps]"""
        return self.labels >= 0


class Rollout:
    """A frozen model that runs whole answers.

    Args:
        plan: without reductions inside the language model; what acts before it, acts here too.
        layer: the decoder layer from which on steps see fewer visual tokens, at least 1.
    """

    def __init__(self, plan: Plan, layer: int) -> None:
        from exporter.stages._reference import reference

        modules = load_reference(plan)
        runners, self.graphs, table = reference(plan, modules)
        if self.graphs.text.planes or self.graphs.reaches or not isinstance(modules.decode, Decoder):
            raise UsageError(
                "DyRate's predictor is trained inside models that look back only and get an image at their first layer; this one "
                "is another. Train on a LLaVA or Qwen2.5-VL checkpoint."
            )
        self.decoder: Decoder = modules.decode
        self.decoder.requires_grad_(False)
        self.visual, self.layer = plan.kept, layer
        self._generator = Generator(runners, self.graphs, table)
        self._table = torch.from_numpy(np.asarray(table))
        self._prompt = prompt_of(plan)

    def batch(self, questions: Sequence[Question]) -> Batch:
        """Prepare questions with their answers as the chat template writes them, up to an end-of-sequence token."""
        graphs: GraphSet = self.graphs
        pixels = np.concatenate([preprocess(q.frames, graphs.image) for q in questions])
        prompts = [self._prompt.ask(q.question, graphs.visual.placeholders, graphs.visual.media) for q in questions]
        answers = [self._answer(q) for q in questions]
        side = self._prompt.side([q.question for q in questions])
        visual = self._generator.reduce(self._generator.vision(pixels), split(prompts, graphs), side)
        whole = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        text, places = split(whole, graphs), arrange(whole, visual.index, graphs)
        steps = max(map(len, answers))
        labels = torch.full((len(answers), steps), -100)
        order = torch.from_numpy(places.order)
        starts = torch.empty(len(answers), 3, dtype=torch.int64)
        for row, answer in enumerate(answers):
            labels[row, steps - len(answer) :] = torch.tensor(answer)
            image = order[row, : self.visual]
            starts[row] = torch.stack([image.min(), image.max() + 1, order[row, -len(answer)] + 1])
        embeds = torch.cat([torch.from_numpy(visual.embeds), self._table[torch.from_numpy(text.ids)]], 1)
        return Batch(embeds.float(), torch.from_numpy(places.position_ids), order, labels, starts)

    def _answer(self, question: Question) -> list[int]:
        visual = self.graphs.visual
        messages = self._prompt.question(question.question, visual.placeholders, visual.media)
        before = self._prompt.encode(messages)
        parts = isinstance(messages[-1]["content"], list)
        content = [{"type": "text", "text": question.answer}] if parts else question.answer
        whole = self._prompt.encode([*messages, {"role": "assistant", "content": content}], answer=False)
        if whole[: len(before)] != before:
            raise UsageError(
                "This checkpoint's chat template does not write an answer behind the prompt that asks for it, so there is "
                "nothing to train on."
            )
        answer = whole[len(before) :]
        ends = [place for place, token in enumerate(answer) if token in self.graphs.text.eos]
        return answer[: ends[0] + 1] if ends else [*answer, self.graphs.text.eos[0]]

    def run(self, batch: Batch, keep: Keep) -> Tensor:
        """Logits [batch, steps, vocab]. Steps see of each visual token what `keep` says, from the layer on."""
        decoder, spec = self.decoder, self.decoder.spec
        steps, seq = batch.labels.shape[1], batch.order.shape[1]
        frame = decoder.frames[0]
        _, *shared = frame(batch.embeds, batch.position_ids, batch.order, None, None, None)
        x: Tensor = batch.embeds
        hidden: Tensor | None = None
        for i, layer in enumerate(decoder.layers):
            cos, sin, bias = frame.of_layer(i, shared)
            if hidden is not None:
                bias = bias + hidden
            x, key, _, query, *_ = layer(x, cos, sin, bias, None, None)
            if i == self.layer - 1:
                seen = Attended(spec, self.visual, query, key, bias, batch.order)
                rows = seen.rows(query[:, :, -steps:], key, bias[:, :, seq - steps : seq]).mean((1, 2))
                part = keep(group_shares(rows, batch.order, batch.starts), _ranks(rows[..., : self.visual]))
                hidden = torch.zeros(len(x), 1, seq, seq)
                hidden[:, 0, seq - steps :, : self.visual] = torch.log(part.clamp_min(1e-9))
                hidden = hidden.repeat(1, 1, spec.heads // spec.kv_heads, 1)
        out: Tensor = decoder.lm_head(decoder.norm.every(x[:, -steps:]))
        return out


def _ranks(rows: Tensor) -> Tensor:
    """The place of every token, the highest score being 0; among equals the earlier first."""
    order: Tensor = rows.argsort(stable=True, dim=-1, descending=True)
    return order.argsort(-1)
