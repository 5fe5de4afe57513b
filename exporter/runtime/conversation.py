"""Several questions about the same images.

    talk = Conversation(generator, prompt, pixel_values)
    first = talk.ask(["What is this?"], max_new_tokens=64)
    more = talk.ask(["What colour is it?"], max_new_tokens=64)

The tower runs once. What the reduction leaves of the images is reused, and so is the cache, as long as neither depends on
the question: only what is new in the conversation runs then. Where the tokens that are kept do depend on it, every turn
chooses them for its own question and runs the whole conversation anew (`Conversation.anew`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.backends._contract import Array
from exporter.errors import UsageError
from exporter.runtime.beam import Beams
from exporter.runtime.cache import Cache
from exporter.runtime.generate import Generator, Result, Timings, Visual
from exporter.runtime.prompt import Message, Prompt, lengthened
from exporter.runtime.sampling import Sampler, greedy
from exporter.runtime.sequence import Prompts, split

OnText = Callable[[int, str], object]
"""Called with (row, piece of the answer) as soon as its characters are complete."""


@dataclass(frozen=True)
class Turn:
    answers: list[str]
    """One per row."""
    result: Result
    """Of what ran for this turn: without an index where visual tokens and cache were reused."""


class Conversation:
    """Questions and answers about images that do not change.

    Args:
        generator: of the exported model. prompt: its tokenizer and chat template.
        pixel_values: float32 [batch, frames, 3, height, width]: a conversation per row, each about its own images.
        side: what the reduction reads beside images and text, as `warp`, see `Generator.reduce`.
    """

    def __init__(
        self, generator: Generator, prompt: Prompt, pixel_values: Array, side: Mapping[str, Array] | None = None
    ) -> None:
        self._generator, self._prompt, self._pixels, self._side = generator, prompt, pixel_values, dict(side or {})
        self._signals: dict[str, Any] | None = None
        self._visual: Visual | None = None
        self._cache: Cache | None = None
        self._messages: list[list[Message]] = []
        self._answers: list[str] = []

    @property
    def anew(self) -> str | None:
        """Why every turn runs the whole conversation again; None where it does not."""
        graphs = self._generator.graphs
        if graphs.reads_text:
            return "The reduction reads the question: every turn reduces the images and runs the conversation anew."
        if graphs.guided:
            return "The language model keeps visual tokens by the question: every turn runs the conversation anew."
        return None

    def messages(self, row: int = 0) -> list[Message]:
        """A row's conversation so far, for chat templates."""
        if not self._messages:
            return []
        return [*self._messages[row], {"role": "assistant", "content": self._answers[row]}]

    def ask(
        self, texts: Sequence[str], max_new_tokens: int, on_text: OnText | None = None,
        sampler: Sampler | Beams = greedy,
    ) -> Turn:  # fmt: skip
        """The next question, one per row.

        Args:
            max_new_tokens: most tokens of an answer, >= 1. on_text: see `OnText`. sampler: see `Generator.generate`.
        Raises:
            UsageError: another number of questions than of rows, or questions that the chat template refuses. The
                conversation is then what it was.
        """
        if len(texts) != len(self._pixels):
            raise UsageError(f"{len(texts)} questions for {len(self._pixels)} conversations; expected as many of each.")
        messages, new = self._next(texts)
        # Decoding changes the cache in place. If it is interrupted, the next turn starts from the messages.
        cache, self._cache = self._cache, None
        said = _Said(self._prompt, self._generator.graphs.text.eos, len(texts), on_text)
        if cache is not None and new is not None:
            result = self._generator.reply(cache, new, max_new_tokens, said.token, sampler)
        else:
            result = self._whole(messages, texts, max_new_tokens, said, sampler)
        answers = said.finish()
        self._messages, self._answers, self._cache = messages, answers, result.cache
        return Turn([answer.strip() for answer in answers], result)

    def _next(self, texts: Sequence[str]) -> tuple[list[list[Message]], Prompts | None]:
        """The conversations with the new questions, and what is new in them; None where they have to run as a whole."""
        if not self._messages:
            visual = self._generator.graphs.visual
            return [self._prompt.question(text, visual.placeholders, visual.media) for text in texts], None
        turns = list(zip(self._messages, self._answers, texts, strict=True))
        messages = [lengthened(*turn) for turn in turns]
        if self.anew is not None or self._cache is None:
            return messages, None
        try:
            return messages, [self._prompt.follow(*turn)[1] for turn in turns]
        except UsageError:  # this chat template rewrites earlier turns
            return messages, None

    def _whole(
        self, messages: list[list[Message]], texts: Sequence[str], max_new_tokens: int, said: _Said,
        sampler: Sampler | Beams,
    ) -> Result:  # fmt: skip
        generator, timings, begin = self._generator, Timings(), time.perf_counter()
        prompts = [self._prompt.encode(conversation) for conversation in messages]
        text = split(prompts, generator.graphs)
        if self._signals is None:
            mark = time.perf_counter()
            self._signals = generator.vision(self._pixels)
            timings.vision_ms = (time.perf_counter() - mark) * 1e3
        visual = self._visual
        if visual is None:
            visual = generator.select(self._signals, text, {**self._prompt.side(texts), **self._side}, timings)
            self._visual = None if generator.graphs.reads_text else visual
        return generator.answer(visual, prompts, max_new_tokens, said.token, sampler, timings, begin)


class _Said:
    """Answers as text, row by row, while their tokens come."""

    def __init__(self, prompt: Prompt, eos: Sequence[int], rows: int, on_text: OnText | None) -> None:
        self._eos, self._on_text = set(eos), on_text
        self._streams = [prompt.stream() for _ in range(rows)]
        self._pieces: list[list[str]] = [[] for _ in range(rows)]

    def token(self, row: int, token: int) -> None:
        if token not in self._eos:
            self._piece(row, self._streams[row].push(token))

    def finish(self) -> list[str]:
        for row, stream in enumerate(self._streams):
            self._piece(row, stream.finish())
        return ["".join(pieces) for pieces in self._pieces]

    def _piece(self, row: int, text: str) -> None:
        self._pieces[row].append(text)
        if text and self._on_text is not None:
            self._on_text(row, text)
