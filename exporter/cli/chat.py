"""`edgetrim chat`: ask a bundle about an image or a clip."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli import _options as options
from exporter.cli._output import Output

if TYPE_CHECKING:
    from exporter.runtime.conversation import Conversation, Turn


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
@click.option(
    "--beams",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Search with N beams; 1 takes the most likely token each time.",
)
@options.threads_option
@options.json_option
def command(
    folder: Path,
    question: str | None,
    images: tuple[Path, ...],
    clips: tuple[Path, ...],
    new_tokens: int,
    beams: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Ask FOLDER about an image or a clip.

    With QUESTION, one answer. Without, in a terminal, a conversation: one line, one turn; an empty line ends it. Where the
    tokens that are kept depend on the question, every turn chooses them anew. A bundle is verified before anything of it is
    loaded. Without an image, the embedded model gets a held-out sample of its own.
    """
    from exporter.bundle import MANIFEST, Bundle
    from exporter.cli import _samples
    from exporter.engines import open_runners
    from exporter.errors import UsageError
    from exporter.job import Job
    from exporter.runtime.conversation import Conversation
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
        if not (frames := _samples.frames(images, clips, graphs.images)):
            sample = _samples.sample(job.checkpoint, graphs.images)
            frames = list(sample.frames)
            if question is None and not talking:
                question, expected = sample.question, sample.answer
        if question is None and not talking:
            raise UsageError('Which question? Give one: `edgetrim chat FOLDER --image PATH "What is this?"`.')
        prompt = Prompt.of(folder / "graphs", graphs)
        pixels = preprocess(frames, graphs.image)
        talk = Conversation(Generator(runners, graphs, embedding), prompt, pixels)
        turns = []
        for asked in _lines(out, executed, talk.anew) if talking else [question or ""]:
            turn = _ask(talk, asked, new_tokens, beams, stream=not as_json)
            tokens, timings = turn.result.tokens[0], turn.result.timings
            turns.append({"question": asked, "answer": turn.answers[0], "tokens": tokens, "timings_ms": timings})
    if as_json:
        visual = {"before": graphs.visual.total, "into_llm": graphs.visual.kept, "per_kv_group": graphs.text.kept}
        out.result({"executed": executed, "visual_tokens": visual, "expected": expected, "turns": turns})
    elif expected is not None:
        out.result(None, f"Asked: {question} The right answer is: {expected}.")


def _lines(out: Output, executed: str, anew: str | None) -> Iterator[str]:
    out.note(f"{executed}. An empty line ends the conversation.")
    if anew:
        out.note(anew)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _ask(talk: Conversation, text: str, new_tokens: int, beams: int, stream: bool) -> Turn:
    """The next turn; printed as it comes with `stream`."""
    from exporter.runtime.beam import Beams
    from exporter.runtime.sampling import greedy

    def on_text(row: int, piece: str) -> None:
        click.echo(piece, nl=False)
        sys.stdout.flush()

    turn = talk.ask([text], new_tokens, on_text if stream else None, Beams(beams) if beams > 1 else greedy)
    if stream:
        click.echo()
    return turn
