"""A stream over the embedded model with `moviechat`: clip by clip, against one long prompt run in full."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from exporter.embedded import CHECKPOINT
from exporter.errors import UsageError
from exporter.families._contract import Request
from exporter.runtime import images
from exporter.runtime.generate import Generator
from exporter.runtime.prompt import Prompt
from exporter.runtime.stream import Stream
from exporter.stages import _task
from exporter.stages._modules import load_reference
from exporter.stages._reference import reference
from tests.families import tiny

FRAMES, NEW = 4, 6


@functools.cache
def generator(*specs: str, frames: int = FRAMES) -> Generator:
    runners, graphs, table = reference(tiny.plan(CHECKPOINT, specs, Request(frames)))
    return Generator(runners, tiny.endless(graphs), table)


MOVIECHAT = "moviechat:keep_frames=2"


@functools.cache
def video() -> Any:
    """float32 [12, 3, height, width]: three clips of held-out questions."""
    spec = generator(MOVIECHAT).graphs.image
    return np.concatenate([images.preprocess(q.frames, spec)[0] for q in _task.embedded(FRAMES, 3)[:3]])


def prompt() -> list[int]:
    found = generator(MOVIECHAT).graphs
    text = Prompt.load(CHECKPOINT, found.text.image_token)
    return text.ask(_task.embedded(FRAMES, 1)[0].question, found.visual.placeholders, found.visual.media)


def test_one_clip_is_that_clip() -> None:
    ours = generator(MOVIECHAT)
    stream = Stream(ours)
    for frame in video()[:FRAMES]:
        stream.push(frame[None])
    assert (stream.clips, stream.tokens) == (1, ours.graphs.visual.kept)
    expected = ours.generate(video()[None, :FRAMES], [prompt()], NEW)
    found = stream.ask([prompt()], NEW)
    assert found.tokens == expected.tokens
    assert (found.index == expected.index).all()


def test_a_long_video_is_one_long_prompt() -> None:
    """Against the decoder run on the whole prompt, in its order and without a cache."""
    ours = generator(MOVIECHAT)
    stream = Stream(ours)
    stream.push(video())
    assert stream.clips == 3
    found = stream.ask([prompt()], NEW)
    plan = tiny.plan(CHECKPOINT, (MOVIECHAT,), Request(FRAMES))
    modules, table = load_reference(plan), plan.checkpoint.tensor("text.embed_tokens.weight").float()
    image = ours.graphs.text.image_token
    at = prompt().index(image)
    words = [t for t in prompt() if t != image]
    with torch.inference_mode():
        clips = torch.from_numpy(video()).unflatten(0, (3, 1, FRAMES))
        seen = [modules.reduce(*modules.vision(clip)) for clip in clips]
        visual = torch.cat([embeds for embeds, _ in seen], 1)
        answer: list[int] = []
        for _ in range(NEW):
            text = table[[*words, *answer]][None]
            x = torch.cat([text[:, :at], visual, text[:, at:]], 1)
            order = torch.arange(x.shape[1])[None]
            answer.append(int(modules.decode(x, order, order)[0].argmax()))
    assert found.tokens == [answer]
    each = ours.graphs.visual.total
    assert found.index[0].tolist() == [i * each + int(j) for i, (_, index) in enumerate(seen) for j in index[0]]


def test_the_oldest_clip_is_forgotten() -> None:
    small, last = Stream(generator(MOVIECHAT), capacity=2), Stream(generator(MOVIECHAT), capacity=2)
    small.push(video())
    last.push(video()[FRAMES:])
    assert small.clips == 2
    assert small.ask([prompt()], NEW).tokens == last.ask([prompt()], NEW).tokens


def test_an_open_clip_is_filled_up_for_the_answer_only() -> None:
    stream, filled = Stream(generator(MOVIECHAT)), Stream(generator(MOVIECHAT))
    stream.push(video()[: FRAMES + 2])
    filled.push(np.concatenate([video()[: FRAMES + 2], *[video()[FRAMES + 1][None]] * 2]))
    assert stream.ask([prompt()], NEW).tokens == filled.ask([prompt()], NEW).tokens
    assert stream.clips == 1
    stream.push(video()[FRAMES + 2 : 2 * FRAMES])
    assert stream.clips == 2


def test_refusals() -> None:
    with pytest.raises(UsageError, match="no frame yet"):
        Stream(generator(MOVIECHAT)).ask([prompt()], 1)
    with pytest.raises(UsageError, match="at least one clip; found capacity 0"):
        Stream(generator(MOVIECHAT), 0)
    with pytest.raises(UsageError, match="exported for clips"):
        Stream(generator(frames=1))
    with pytest.raises(UsageError, match="position=compact"):
        Stream(generator("uniform:keep=8"))
    with pytest.raises(UsageError, match="guided by the question"):
        Stream(generator("lftr:spatial=text,keep=8"))
    with pytest.raises(UsageError, match="inside the language model"):
        Stream(generator(MOVIECHAT, "fastv:keep=8"))
    stream = Stream(generator(MOVIECHAT))
    stream.push(video()[:FRAMES])
    with pytest.raises(UsageError, match="one prompt at a time; found 2"):
        stream.ask([prompt()] * 2, 1)
