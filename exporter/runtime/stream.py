"""A video of any length, clip by clip: a long memory of what a video reduction leaves of each.

    stream = Stream(generator, capacity=128)
    for frame in camera:
        stream.push(preprocessed frame)
        …
    result = stream.ask([prompt.ask("What happened?")], max_new_tokens=64)

The model is exported for clips of as many frames as the short-term memory holds (MovieChat: 18), with a reduction that
leaves few of them (`moviechat`: 2). Whenever a clip is full, it goes through the tower and the reduction, and what is left
joins the long-term memory; the oldest leaves when that is full. Memory and time per frame do not grow with the video.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import replace

import numpy as np

from exporter.backends._contract import Array
from exporter.errors import UsageError
from exporter.runtime.generate import Generator, OnToken, Result, Visual
from exporter.runtime.sampling import Sampler, greedy
from exporter.runtime.sequence import Prompts


class Stream:
    """One video.

    Args:
        generator: of a model exported for clips, whose reduction renumbers positions and asks nothing of the prompt.
        capacity: clips that the long-term memory holds.
    Raises:
        UsageError: a model that cannot stream; says why.
    """

    def __init__(self, generator: Generator, capacity: int = 128) -> None:
        graphs = generator.graphs
        if capacity < 1:
            raise UsageError(f"A stream needs room for at least one clip; found capacity {capacity}.")
        if graphs.images < 2:
            raise UsageError("A stream needs a model exported for clips: pass --frames to export.")
        if graphs.visual.policy != "compact":
            raise UsageError("A stream has no positions to keep: export with position=compact.")
        if graphs.reads_text:
            raise UsageError("This model's reduction is guided by the question, which a stream does not know yet.")
        if graphs.prefill_apart:
            raise UsageError(
                "A reduction inside the language model or of its cache has one number of visual tokens; a stream has many."
            )
        self._generator = generator
        self._waiting: list[Array] = []
        self._clips: deque[Visual] = deque(maxlen=capacity)

    @property
    def clips(self) -> int:
        """Clips in the long-term memory."""
        return len(self._clips)

    @property
    def tokens(self) -> int:
        """Visual tokens in the long-term memory."""
        return sum(clip.embeds.shape[1] for clip in self._clips)

    def push(self, frames: Array) -> None:
        """More frames: float32 [n, 3, height, width], preprocessed as for `Generator.generate`."""
        size = self._generator.graphs.images
        self._waiting += list(frames)
        while len(self._waiting) >= size:
            clip, self._waiting = self._waiting[:size], self._waiting[size:]
            self._clips.append(self._reduced(clip))

    def ask(
        self, input_ids: Prompts, max_new_tokens: int, on_token: OnToken | None = None, sampler: Sampler = greedy
    ) -> Result:
        """Answer about everything seen so far. Frames that do not fill a clip yet are filled up with the last one, for this
        answer only.

        Args:
            input_ids: one prompt, with the image tokens of one clip; the whole memory stands at the first of them.
        Raises:
            UsageError: nothing was pushed yet.
        """
        clips = list(self._clips)
        if self._waiting:
            size = self._generator.graphs.images
            clips.append(self._reduced([*self._waiting, *self._waiting[-1:] * (size - len(self._waiting))]))
        if not clips:
            raise UsageError("The stream has no frame yet; push some before asking.")
        if len(input_ids) != 1:
            raise UsageError(f"A stream answers one prompt at a time; found {len(input_ids)}.")
        graphs = self._generator.graphs
        count, each = len(clips), graphs.visual.total
        layout = replace(graphs.visual, total=each * count, kept=graphs.visual.kept * count)
        index = [np.where(clip.index >= 0, clip.index + i * each, -1) for i, clip in enumerate(clips)]
        sizes = [clip.size for clip in clips if clip.size is not None]
        visual = Visual(
            np.concatenate([clip.embeds for clip in clips], 1),
            np.concatenate(index, 1),
            np.concatenate(sizes, 1) if sizes else None,
        )
        longer = copy.copy(self._generator)
        longer.graphs = replace(graphs, visual=layout)
        return longer.answer(visual, input_ids, max_new_tokens, on_token, sampler)

    def _reduced(self, frames: list[Array]) -> Visual:
        return self._generator.reduce(self._generator.vision(np.stack(frames)[None].astype(np.float32)))
