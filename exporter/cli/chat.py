"""`edgetrim chat`: ask a bundle about an image or a clip."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli import _options as options
from exporter.cli._output import Output

if TYPE_CHECKING:
    from exporter.runtime.generate import Cache, Generator, Result
    from exporter.runtime.prompt import Message, Prompt


@click.command()
@options.folder_argument
@click.argument("question", required=False)
@options.images_options
@click.option(
    "--new-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    metavar="N",
    help="Most tokens of an answer.",
)
@options.threads_option
@options.json_option
def command(
    folder: Path,
    question: str | None,
    images: tuple[Path, ...],
    clips: tuple[Path, ...],
    new_tokens: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Ask FOLDER about an image or a clip.

    With QUESTION, one answer. Without, in a terminal, a conversation: one line, one turn; an empty line ends it. A bundle
    is verified before anything of it is loaded. Without an image, the embedded model gets a held-out sample of its own.
    """
    from exporter.bundle import MANIFEST, Bundle
    from exporter.cli import _samples
    from exporter.errors import UsageError
    from exporter.pipeline import Job, open_runners
    from exporter.runtime.generate import Generator
    from exporter.runtime.images import preprocess
    from exporter.runtime.prompt import Prompt
    from exporter.workspace import Workspace

    out = Output(as_json)
    if (folder / MANIFEST).is_file():
        with out.stage("verify"):
            Bundle.open(folder)
    job = Job.read(Workspace(folder))
    talking = question is None and not as_json and sys.stdin.isatty()
    with open_runners(folder, job.loaded_profile(), threads) as (runners, graphs, embedding, executed):
        expected = None
        if not (frames := _samples.frames(images, clips, graphs.visual.frames)):
            sample = _samples.sample(job.checkpoint, graphs.visual.frames)
            frames = sample.frames
            if question is None and not talking:
                question, expected = sample.question, sample.answer
        if question is None and not talking:
            raise UsageError('Which question? Give one: `edgetrim chat FOLDER --image PATH "What is this?"`.')
        prompt = Prompt.load(folder / "graphs" / "processor", graphs.text.image_token)
        talk = _Talk(Generator(runners, graphs, embedding), prompt, preprocess(frames, graphs.image), new_tokens)
        turns = []
        for asked in _lines(out, executed) if talking else [question or ""]:
            answer, result = talk.ask(asked, stream=not as_json)
            turns.append(
                {"question": asked, "answer": answer, "tokens": result.tokens[0], "timings_ms": result.timings}
            )
    if as_json:
        tokens = {"before": graphs.visual.total, "into_llm": graphs.visual.kept, "per_kv_group": graphs.text.kept}
        out.result({"executed": executed, "visual_tokens": tokens, "expected": expected, "turns": turns})
    elif expected is not None:
        out.result(None, f"Asked: {question} The right answer is: {expected}.")


def _lines(out: Output, executed: str) -> Iterator[str]:
    out.note(f"{executed}. An empty line ends the conversation.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


class _Talk:
    """A conversation about one image or clip."""

    def __init__(self, generator: Generator, prompt: Prompt, pixels: Any, new_tokens: int) -> None:
        self.generator, self.prompt, self.pixels, self.new_tokens = generator, prompt, pixels, new_tokens
        self.messages: list[Message] = []
        self.answer = ""
        self.cache: Cache | None = None

    def ask(self, text: str, stream: bool) -> tuple[str, Result]:
        """The answer to the next question; printed as it comes with `stream`."""
        decoder, told = self.prompt.stream(), []
        stop = set(self.generator.graphs.text.eos)

        def tell(piece: str) -> None:
            told.append(piece)
            if stream:
                click.echo(piece, nl=False)
                sys.stdout.flush()

        def on_token(row: int, token: int) -> None:
            if token not in stop:
                tell(decoder.push(token))

        result = self._run(text, on_token)
        tell(decoder.finish())
        if stream:
            click.echo()
        self.answer, self.cache = "".join(told), result.cache
        return self.answer.strip(), result

    def _run(self, text: str, on_token: Any) -> Result:
        """Only what is new in the conversation; all of it anew where the chat template rewrites earlier turns."""
        from exporter.errors import UsageError

        visual = self.generator.graphs.visual
        if self.cache is None:
            self.messages = list(self.prompt.question(text, visual.placeholders, visual.media))
        else:
            try:
                self.messages, new = self.prompt.follow(self.messages, self.answer, text)
                return self.generator.reply(self.cache, [new], self.new_tokens, on_token)
            except UsageError:
                plain = isinstance(self.messages[-1]["content"], str)
                for role, words in (("assistant", self.answer), ("user", text)):
                    self.messages.append(
                        {"role": role, "content": words if plain else [{"type": "text", "text": words}]}
                    )
        ids, side = self.prompt.encode(self.messages), self.prompt.side([text])
        return self.generator.generate(self.pixels, [ids], self.new_tokens, on_token, side=side)
