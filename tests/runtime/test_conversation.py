"""Turns of a conversation are what one run of the whole history gives, whether they reuse what there is or not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from exporter.backends.ort import OnnxRuntime
from exporter.errors import UsageError
from exporter.runtime.beam import Beams
from exporter.runtime.conversation import Conversation
from exporter.runtime.generate import Generator
from exporter.runtime.prompt import Prompt
from exporter.runtime.sampling import Logits, greedy
from exporter.runtime.sequence import Ints
from tests.families import tiny as families
from tests.runtime import tiny
from tests.runtime.test_generate import PIXELS, Reference, opened

SPECIAL = ["<unk>", "<s>", "</s>", "<image>"]
QUESTIONS = [["w10 w11 w12", "w20"], ["w13", "w21 w22 w23"], ["w14 w15", "w24 w25"]]
REWRITES = (
    "{{ messages | length }} {% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% else %}<image> {% endif %}{% endfor %}{% endfor %}"
)
"""A template that begins with the number of messages."""
IN_LLM = {"keep": 4, "stay": 2}
"""Half of the visual tokens stay behind the first layer."""


def prompt(template: str | None = None) -> Prompt:
    words = [*SPECIAL, "USER:", "ASSISTANT:", *(f"w{i}" for i in range(6, tiny.VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return Prompt(tokenizer, template, {"eos_token": "</s>"}, "<image>")


def says_words(logits: Logits) -> Ints:
    """Greedy, without the tokens that are lost in decoding."""
    allowed = logits.copy()
    allowed[:, [0, 1, tiny.IMAGE]] = -np.inf
    return greedy(allowed)


class Counted(Generator):
    """Counts what runs."""

    def __init__(self, of: Generator) -> None:
        self.__dict__, self.ran = dict(of.__dict__), Counter[str]()

    def vision(self, *arguments: Any) -> Any:
        self.ran["vision"] += 1
        return super().vision(*arguments)

    def reduce(self, *arguments: Any) -> Any:
        self.ran["reduce"] += 1
        return super().reduce(*arguments)

    def prefill(self, *arguments: Any) -> Any:
        self.ran["prefill"] += 1
        return super().prefill(*arguments)


@pytest.mark.parametrize(
    ("layout", "guided", "template", "ran"),
    [
        ({"keep": 2}, False, None, {"vision": 1, "reduce": 1, "prefill": 1}),
        ({"keep": 2}, False, REWRITES, {"vision": 1, "reduce": 1, "prefill": 3}),
        ({"keep": 2, "guided": True}, False, None, {"vision": 1, "reduce": 3, "prefill": 3}),
        (IN_LLM, True, None, {"vision": 1, "reduce": 1, "prefill": 3}),
        (IN_LLM | {"guided": True}, True, None, {"vision": 1, "reduce": 3, "prefill": 3}),
    ],
    ids=["reused", "rewritten", "guided", "guided-in-llm", "guided-twice"],
)
def test_every_turn_is_that_of_the_whole_history(
    tmp_path: Path, layout: dict[str, Any], guided: bool, template: str | None, ran: dict[str, int]
) -> None:
    graphs = replace(tiny.export(tmp_path, **layout), guided=guided)
    with opened(tmp_path, graphs) as generator:
        counted, words = Counted(generator), prompt(template)
        talk = Conversation(counted, words, PIXELS)
        assert (talk.anew is None) == (not guided and not layout.get("guided"))
        histories: list[list[Any]] = [[], []]
        for texts in QUESTIONS:
            pieces: list[list[str]] = [[], []]
            turn = talk.ask(texts, 6, lambda row, piece, told=pieces: told[row].append(piece), says_words)
            for row, text in enumerate(texts):
                content = [{"type": "text", "text": text}]
                histories[row].append({"role": "user", "content": content if histories[row] else [image(), *content]})
            whole = generator.generate(PIXELS, [words.encode(history) for history in histories], 6, None, says_words)
            assert turn.result.tokens == whole.tokens
            assert turn.answers == [words.decode(row) for row in whole.tokens]
            assert ["".join(row).strip() for row in pieces] == turn.answers
            assert max(map(len, pieces)) > 1, "nothing was streamed"
            for row, answer in enumerate(turn.answers):
                told = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
                histories[row].append(told)
        assert counted.ran == ran
        assert (turn.result.index.shape[1] == 0) == (ran["prefill"] == 1)
        assert (turn.result.timings.vision_ms, turn.result.timings.reduce_ms > 0) == (0, ran["reduce"] > 1)
        roles = [message["role"] for message in talk.messages(1)]
    assert roles == ["user", "assistant"] * 3


def image() -> dict[str, str]:
    return {"type": "image"}


def test_a_cache_pruned_without_the_question_is_reused(tmp_path: Path) -> None:
    graphs = tiny.export(tmp_path, **IN_LLM)
    with opened(tmp_path, graphs) as generator:
        counted, words = Counted(generator), prompt()
        talk = Conversation(counted, words, PIXELS)
        assert talk.anew is None
        turns = [talk.ask(texts, 4) for texts in QUESTIONS]
        assert counted.ran == {"vision": 1, "reduce": 1, "prefill": 1}
        alone = Conversation(generator, words, PIXELS[1:])
        assert [alone.ask(texts[1:], 4).answers[0] for texts in QUESTIONS] == [turn.answers[1] for turn in turns]


def test_beams(tmp_path: Path) -> None:
    graphs = tiny.export(tmp_path, keep=2)
    with opened(tmp_path, graphs) as generator:
        words = prompt()
        talk = Conversation(generator, words, PIXELS[:1])
        for text in ("w10 w11", "w12"):
            said = talk.ask([text], 5, sampler=Beams(3)).result.tokens
            assert not set(said[0]) & {0, 1, tiny.IMAGE}
            ids = words.encode(talk.messages()[:-1])
            assert said == generator.generate(PIXELS[:1], [ids], 5, sampler=Beams(3)).tokens


def test_several_images_in_one_prompt(tmp_path: Path) -> None:
    """Each stands at its own placeholder: run in full, in the order of the prompt, they give the same answers."""
    graphs = tiny.export(tmp_path, frames=2, placeholders=2)
    pixels = np.random.default_rng(8).uniform(-1, 1, (1, 2, 3, tiny.SIDE, tiny.SIDE)).astype(np.float32)
    with opened(tmp_path, graphs) as generator, OnnxRuntime().runner(tmp_path / "decode.onnx", 1) as runner:
        words, reference = prompt(), Reference(tmp_path, runner)
        found = []
        for images in (pixels, pixels[:, ::-1].copy()):
            talk = Conversation(generator, words, images)
            seen = generator.reduce(generator.vision(images)).embeds[0]
            for text in ("w10 w11", "w12 w13"):
                found.append(talk.ask([text], 6).result.tokens[0])
                assert not set(found[-1]) & {0, 1, tiny.IMAGE}, "lost in decoding"
                history = words.encode(talk.messages()[:-1])
                assert history.count(tiny.IMAGE) == 2
                assert found[-1] == reference.greedy(reference.embeds(seen, history), 6)
    assert found[:2] != found[2:], "which image is which must matter"


def test_an_interrupted_turn_leaves_the_conversation_as_it_was(tmp_path: Path) -> None:
    graphs = tiny.export(tmp_path, keep=2)

    def interrupt(row: int, piece: str) -> None:
        raise KeyboardInterrupt

    with opened(tmp_path, graphs) as generator:
        words = prompt()
        talk, quiet = (Conversation(generator, words, PIXELS) for _ in range(2))
        assert talk.messages() == []
        for one in (talk, quiet):
            one.ask(QUESTIONS[0], 4)
        with pytest.raises(KeyboardInterrupt):
            talk.ask(QUESTIONS[1], 4, on_text=interrupt)
        assert talk.messages() == quiet.messages()
        with pytest.raises(UsageError, match="1 questions for 2 conversations"):
            talk.ask(["w10"], 4)
        assert talk.ask(QUESTIONS[2], 4).answers == quiet.ask(QUESTIONS[2], 4).answers


@pytest.mark.parametrize(
    ("reductions", "reads_text", "guided"),
    [
        (("visionzip:keep_ratio=0.5",), False, False),
        (("lftr:spatial=text,keep=6",), True, False),
        (("fastv:keep=4",), False, True),
    ],
)
def test_an_export_says_whether_the_question_matters(
    tmp_path: Path, reductions: tuple[str, ...], reads_text: bool, guided: bool
) -> None:
    from exporter.stages._reference import reference

    families.llava(tmp_path)
    _, graphs, _ = reference(families.plan(tmp_path, reductions))
    assert (graphs.reads_text, graphs.guided) == (reads_text, guided)
