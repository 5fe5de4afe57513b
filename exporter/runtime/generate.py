"""Drive the exported graphs: image and prompt in, tokens out. Numpy on the host, any backend's `Runner`s below it.

    with backend.runner(…) as vision, …:
        generator = Generator({"vision": vision, …}, graphs, embedding(folder, graphs))
        result = generator.generate(pixel_values, [prompt.ask("What is this?")], max_new_tokens=64)
        more = generator.reply(result.cache, [ids of the next turn], max_new_tokens=64)

A `Generator` has no state of its own: what a conversation has so far is in its `Cache`. Keys and values stay the
runner's device values from one step to the next; only logits, kept indices and visual embeddings come to the host.
Stage times are taken around `Runner.run`, which returns when its results are there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.backends._contract import PAST, PRESENT, Array, Runner
from exporter.errors import UsageError, VerificationError
from exporter.graphset import GraphSet
from exporter.runtime.beam import Beams, search
from exporter.runtime.cache import Cache
from exporter.runtime.sampling import Logits, Sampler, greedy, pick
from exporter.runtime.sequence import Ints, Prompts, Text, Tokens, arrange, check_ids, pad, split
from exporter.runtime.shrink import Shrinking
from exporter.runtime.step import Stepping, check_longest
from exporter.runtime.warp import at_rest

OnToken = Callable[[int, int], object]
"""Called with (row, token) as soon as a token is there."""


@dataclass(frozen=True)
class Visual:
    """What the vision side hands to the language model."""

    embeds: Array
    """[batch, kept, hidden], on the host."""
    index: Ints
    """[batch, kept]"""
    size: Array | None = None
    """float32 [batch, kept]: tokens each one stands for, where the language model counts them."""
    signals: Mapping[str, Any] = field(default_factory=dict)
    """Those of `vision` that prefill reads itself, as it takes them."""


@dataclass(frozen=True)
class Prefilled:
    logits: Logits
    cache: Cache
    kept: dict[str, Array]
    """The prefill graph's `kept_*` outputs: what reductions inside the language model kept; `cached_*`: those of the cache,
    places among the visual tokens that entered it."""


@dataclass
class Timings:
    """Wall time on the host. For `reply`, `prefill_ms` is that of the new text."""

    vision_ms: float = 0.0
    question_ms: float = 0.0
    """0 where there is no such graph."""
    reduce_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)
    """One per decode step, sampling included; the first token belongs to prefill."""
    ttft_ms: float = 0.0
    """From the call to the first token; with beams, to the answer."""


@dataclass(frozen=True)
class Result:
    tokens: list[list[int]]
    """Per row, with the eos that ended it, if one did."""
    index: Ints
    """[batch, kept]: visual tokens that entered the language model; empty for `reply`."""
    kept: dict[str, Array]
    timings: Timings
    cache: Cache


def embedding(folder: Path, graphs: GraphSet) -> Array:
    """The token embedding table of an export, memory-mapped: [vocab, hidden]."""
    path = folder / graphs.embedding
    try:
        table: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # numpy reads the header as Python, and raises whatever that does
        raise VerificationError(f"{path} cannot be read: {e}. Run export again.") from e
    return table


class Generator:
    """Runs one model's graphs.

    Args:
        runners: role → opened runner. Where prefill and decode are one file, either may stand for both.
        graphs: the exported model.
        embedding: the token embedding table [vocab, hidden].
        chunk: most tokens that the language model runs at once in `extend`, and in `prefill` where that is not a graph
            of its own; else what the runner says (`Runner.chunk`).
    """

    def __init__(
        self, runners: Mapping[str, Runner], graphs: GraphSet, embedding: Array, chunk: int | None = None
    ) -> None:
        text = graphs.text
        if embedding.shape != (text.vocab, text.hidden):
            raise VerificationError(
                f"{graphs.embedding} has shape {list(embedding.shape)}, expected {[text.vocab, text.hidden]}. "
                "Run export again."
            )
        self.graphs = graphs
        self._embedding = np.asarray(embedding)
        runners = _complete(runners, graphs)
        self._vision, self._reduce = runners["vision"], runners["reduce"]
        self._prefill, self._decode = runners["prefill"], runners["decode"]
        self._question = runners.get("question")
        self._chunk = chunk or self._decode.chunk(cached=False)
        self._chunk_cached = chunk or self._decode.chunk(cached=True)
        kinds = self._prefill.inputs
        self._nothing = {
            name: (tuple(size or 0 for size in shape), kinds[name])
            for name, (_, shape) in graphs.cache().items()
            if name in kinds
        }
        self._shrinking = Shrinking(runners, graphs, self._hand) if graphs.buckets else None
        self._signals = [name for name in self._reduce.inputs if name not in graphs.side]
        presents = [PRESENT + name[len(PAST) :] for name in self._decode.inputs if name.startswith(PAST)]
        _check(self._vision, "vision", [*self._signals, *graphs.for_prefill])
        _check(self._reduce, "reduce", ["visual_embeds", "index"])
        if self._question is not None:
            _check(self._question, "question", ["aligned_text"])
        for role, runner in (("prefill", self._prefill), ("decode", self._decode)):
            _check(runner, role, ["logits", *presents])

    @property
    def batch(self) -> int | None:
        """Most images (or clips) at once; None: any number."""
        return self._vision.batch

    def generate(
        self,
        pixel_values: Array,
        input_ids: Prompts,
        max_new_tokens: int,
        on_token: OnToken | None = None,
        sampler: Sampler | Beams = greedy,
        side: Mapping[str, Array] | None = None,
    ) -> Result:
        """Answer prompts about images.

        Args:
            pixel_values: float32 [batch, frames, 3, height, width].
            input_ids: one prompt per row, of any lengths, each with `graphs.visual.placeholders` image tokens.
            max_new_tokens: most tokens per row, >= 1; a row ends at an eos.
            on_token: called with (row, token) for every token.
            sampler: chooses tokens from logits; or `Beams`, where tokens are told when the search is over.
            side: see `reduce`.
        """
        _positive(max_new_tokens)
        if len(pixel_values) != len(input_ids):
            raise UsageError(
                f"{len(pixel_values)} images (or clips) and {len(input_ids)} prompts; expected as many of each."
            )
        timings, begin = Timings(), time.perf_counter()
        text = split(input_ids, self.graphs)
        mark = time.perf_counter()
        signals = self.vision(pixel_values)
        timings.vision_ms = _ms(mark)
        visual = self.select(signals, text, side, timings)
        return self.answer(visual, input_ids, max_new_tokens, on_token, sampler, timings, begin)

    def select(
        self, signals: Mapping[str, Any], text: Text | None, side: Mapping[str, Array] | None, timings: Timings
    ) -> Visual:
        """`question`, where it is asked, and `reduce`; what they took goes into `timings`."""
        mark = time.perf_counter()
        if self._question is not None and side and "question_ids" in side:
            side = {**side, "aligned_text": self.question(side["question_ids"])}
            timings.question_ms, mark = _ms(mark), time.perf_counter()
        visual = self.reduce(signals, text, side)
        timings.reduce_ms = _ms(mark)
        return visual

    def answer(
        self,
        visual: Visual,
        input_ids: Prompts,
        max_new_tokens: int,
        on_token: OnToken | None = None,
        sampler: Sampler | Beams = greedy,
        timings: Timings | None = None,
        begin: float | None = None,
    ) -> Result:
        """Answer prompts about visual tokens that are there already; as `generate` from then on.

        Args:
            visual: from `reduce`. timings: what was spent on it. begin: when that began, on the clock of
                `time.perf_counter`.
        """
        _positive(max_new_tokens)
        timings, mark = timings or Timings(), time.perf_counter()
        prefilled = self.prefill(visual, input_ids)
        timings.prefill_ms = _ms(mark)
        begin = mark if begin is None else begin
        tokens = self._answer(prefilled.logits, prefilled.cache, max_new_tokens, on_token, sampler, timings, begin)
        return Result(tokens, visual.index, prefilled.kept, timings, prefilled.cache)

    def reply(
        self,
        cache: Cache,
        input_ids: Prompts,
        max_new_tokens: int,
        on_token: OnToken | None = None,
        sampler: Sampler | Beams = greedy,
    ) -> Result:
        """Answer the next turn of a conversation: text only, see `extend`."""
        _positive(max_new_tokens)
        timings, begin = Timings(), time.perf_counter()
        logits = self.extend(cache, input_ids)
        timings.prefill_ms = _ms(begin)
        tokens = self._answer(logits, cache, max_new_tokens, on_token, sampler, timings, begin)
        return Result(tokens, np.empty((len(input_ids), 0), np.int64), {}, timings, cache)

    def vision(self, pixel_values: Array) -> dict[str, Any]:
        """The signals `reduce` asks for, as device values."""
        image = self.graphs.image
        if pixel_values.ndim != 5 or pixel_values.shape[2:] != (3, image.height, image.width):
            raise UsageError(
                f"pixel_values has shape {list(pixel_values.shape)}; this model was exported for "
                f"[batch, frames, 3, {image.height}, {image.width}]."
            )
        return self._vision.run({"pixel_values": self._as(self._vision, "pixel_values", pixel_values)})

    def question(self, question_ids: Array) -> Array:
        """The questions in the space that CLIP's text shares with the patches: float [batch, shared].

        Args:
            question_ids: int64 [batch, graphs.question_tokens], see `exporter.runtime.question`.
        Raises:
            UsageError: no reduction of this model reads the question so, or another shape.
        """
        runner, tokens = self._question, self.graphs.question_tokens
        if runner is None:
            raise UsageError("No reduction of this model reads the question with CLIP; leave `question_ids` out.")
        if question_ids.ndim != 2 or question_ids.shape[1] != tokens:
            raise UsageError(
                f"question_ids has shape {list(question_ids.shape)}; this model was exported for [batch, {tokens}]."
            )
        found = runner.run({"question_ids": self._as(runner, "question_ids", question_ids)})
        return runner.numpy(found["aligned_text"])

    def reduce(
        self, signals: Mapping[str, Any], text: Text | None = None, side: Mapping[str, Array] | None = None
    ) -> Visual:
        """Keep the visual tokens that the exported reduction keeps.

        Args:
            signals: from `vision`, or arrays of any float type. text: only matters if the reduction takes more than
                those.
            side: inputs of the reduction that neither the images nor the prompt give; what it does not ask for is not
                read. `question_ids` int64 [batch, graphs.question_tokens], the question alone in CLIP's tokens, see
                `exporter.runtime.question` (or `aligned_text`, what `question` made of them). `instruction_ids` and
                `instruction_mask` int64 [batch, 128], the question alone in a Q-Former's tokens, see there. `warp` int64
                [batch, frames, tokens], see `exporter.runtime.warp`; without it the camera is taken to be at rest.
        """
        runner = self._reduce
        feeds = self._signals_for(runner, signals, self._signals) | self._side(text, side or {})
        found = {name: runner.numpy(value) for name, value in runner.run(feeds).items()}
        index = found["index"].astype(np.int64, copy=False)
        handed = self._signals_for(self._prefill, signals, self.graphs.for_prefill)
        return Visual(found["visual_embeds"], index, found.get("visual_size"), handed)

    def _signals_for(self, taker: Runner, signals: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Outputs of `vision` as another runner takes them."""
        feeds = {name: self._hand(signals[name], self._vision, taker) for name in names}
        return feeds | {n: self._as(taker, n, v) for n, v in feeds.items() if isinstance(v, np.ndarray)}

    def _side(self, text: Text | None, given: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs of `reduce` that do not come from `vision`."""
        runner, feeds = self._reduce, {}
        for name in self.graphs.side:
            if name in ("text", "text_mask"):
                if text is None:
                    raise UsageError("This reduction is guided by the prompt: give `reduce` the text.")
                value: Array = self._embedding[text.ids] if name == "text" else text.mask
            elif name in given:
                value = given[name]
            elif name == "aligned_text" and "question_ids" in given:
                value = self.question(given["question_ids"])
            elif name == "warp" and text is not None:
                frames, tokens = self.graphs.signals["hidden"][:2]
                value = np.broadcast_to(at_rest(frames, tokens), (len(text.ids), frames, tokens))
            else:
                needed = "question_ids" if name == "aligned_text" else name
                raise UsageError(f"This reduction needs `{needed}`; give it to `generate` in `side`.")
            if text is not None and len(value) != len(text.ids):
                raise UsageError(f"`{name}` is for {len(value)} samples; expected {len(text.ids)}, one per prompt.")
            feeds[name] = self._as(runner, name, value)
        return feeds

    def prefill(self, visual: Visual, input_ids: Prompts, text: Text | None = None) -> Prefilled:
        """Run the prompts, chunk by chunk in their own order if they are longer than one.

        A prefill graph of its own, as a reduction inside the language model makes it, has to see all visual tokens to choose
        among them: there it is one call, whatever `chunk` says.

        Args:
            visual: from `reduce`.
            input_ids: the prompts with their image tokens.
            text: `split(input_ids, graphs)`, if at hand.
        """
        runner = self._prefill
        text = text or split(input_ids, self.graphs)
        places = arrange(input_ids, visual.index, self.graphs)
        words = self._as(runner, "inputs_embeds", self._embedded(text.ids))
        seen = self._as(runner, "inputs_embeds", visual.embeds)
        size = None
        if visual.size is not None:
            size = np.concatenate([visual.size, np.ones(text.ids.shape, np.float32)], axis=1)
        tokens = Tokens(np.concatenate([seen, words], axis=1), places.position_ids, places.order, size, places.reach)
        first, *rest = self._parts(tokens)
        batch = len(input_ids)
        past = {name: np.empty((batch, *shape), dtype) for name, (shape, dtype) in self._nothing.items()}
        found, grown = runner.grow({**self._feeds(runner, first), **visual.signals}, past, first.order.shape[1])
        if type(runner) is not type(self._decode):
            grown = {name: self._hand(value, runner, self._decode) for name, value in grown.items()}
        cache = Cache(grown, places.next_position, places.next_order, [[] for _ in range(batch)])
        if self._shrinking is not None:
            cache.shrunk = self._shrinking.begin(found, runner)
        logits = _logits(runner, found)
        for part in rest:
            logits = self._run(cache, part)
        kept = {name: runner.numpy(value) for name, value in found.items() if name.startswith(("kept_", "cached_"))}
        return Prefilled(logits, cache, kept)

    def step(self, cache: Cache, tokens: Ints, active: npt.NDArray[np.bool_] | None = None) -> Logits:
        """Run one token per row.

        Args:
            cache: the conversation.
            tokens: int64 [batch].
            active: [batch]; rows that are False have ended, see `Stepping`.
        """
        shrinking, shrunk = self._shrinking, cache.shrunk
        if shrinking is None or shrunk is None:
            with self._stepping(cache, active) as step:
                return step(tokens.tolist())
        cache.past = shrinking.cut(shrunk, cache.past, active)
        with self._stepping(cache, active) as step:
            logits = step(tokens.tolist())
            shrinking.ran(shrunk, step.found)
        return logits

    def rows(self, cache: Cache, rows: Ints) -> Cache:
        """A cache of its own with rows of another, int64 [n], in any order and each as often as named."""
        return cache.rows(rows, self._decode)

    def extend(self, cache: Cache, input_ids: Prompts) -> Logits:
        """Run more text, such as the next turn of a conversation.

        Args:
            cache: the conversation.
            input_ids: one row each, of any lengths. What was generated last and not run yet is put before it, except an
                eos: that, the text of the next turn writes itself if it belongs there.
        Returns:
            The logits behind the last token of every row.
        """
        if len(input_ids) != len(cache.pending):
            raise UsageError(
                f"{len(input_ids)} texts for {len(cache.pending)} conversations; expected as many of each."
            )
        rows = [[*waiting, *new] for waiting, new in zip(cache.pending, input_ids, strict=True)]
        for i, (row, new) in enumerate(zip(rows, input_ids, strict=True)):
            if not row:
                raise UsageError(f"Text {i} is empty; expected at least one token.")
            if self.graphs.text.image_token in new:  # a model may say one; that is a word then
                raise UsageError(
                    f"Text {i} holds an image token; a conversation has its images in the first prompt only."
                )
            check_ids(new, self.graphs, i)
        text = pad(rows)
        for part in self._chunks(self._words(text.ids, *cache.places(text.mask))):
            logits = self._run(cache, part)
        cache.advance(text.mask.sum(axis=1))
        cache.pending = [[] for _ in rows]
        return logits

    def _answer(
        self, logits: Logits, cache: Cache, max_new_tokens: int, on_token: OnToken | None, sampler: Sampler | Beams,
        timings: Timings, begin: float,
    ) -> list[list[int]]:  # fmt: skip
        """Decode until every row has ended."""
        if isinstance(sampler, Beams):
            return self._search(logits, cache, max_new_tokens, on_token, sampler, timings, begin)
        tokens: list[list[int]] = [[] for _ in cache.pending]
        live, eos = list(range(len(tokens))), set(self.graphs.text.eos)
        picked = pick(sampler, logits)
        timings.ttft_ms = _ms(begin)
        with ExitStack() as stack:
            step: Callable[[list[int]], Logits] | None = None
            for left in range(max_new_tokens - 1, -1, -1):
                ended = False
                for row in live:
                    token = picked[row]
                    tokens[row].append(token)
                    ended |= token in eos
                    if on_token is not None:
                        on_token(row, token)
                if ended:
                    stack.close()
                    live, step = [row for row in live if picked[row] not in eos], None
                if not left or not live:
                    break
                mark = time.perf_counter()
                if step is None:
                    step = self._steps(cache, live, stack)
                picked = pick(sampler, step(picked))
                timings.decode_ms.append(_ms(mark))
        cache.pending = [[said[-1]] if row in live else [] for row, said in enumerate(tokens)]
        return tokens

    def _steps(self, cache: Cache, live: Sequence[int], stack: ExitStack) -> Callable[[list[int]], Logits]:
        """Runs one token per row until the stack is closed. live: rows that have not ended."""
        rows = len(cache.pending)
        active = None if len(live) == rows else np.isin(np.arange(rows), live)
        if cache.shrunk is None:
            return stack.enter_context(self._stepping(cache, active))
        return lambda tokens: self.step(cache, np.array(tokens), active)

    def _search(
        self, logits: Logits, cache: Cache, max_new_tokens: int, on_token: OnToken | None, beams: Beams,
        timings: Timings, begin: float,
    ) -> list[list[int]]:  # fmt: skip
        """The best answer of every row; the cache stays where it was, the answer is pending."""
        eos = self.graphs.text.eos
        found = search(self, logits, cache, beams, max_new_tokens, eos, timings.decode_ms)
        tokens = [answers[0].tokens for answers in found]
        timings.ttft_ms = _ms(begin)
        for row, token in ((row, token) for row, answer in enumerate(tokens) for token in answer):
            if on_token is not None:
                on_token(row, token)
        cache.pending = [[token for token in answer if token not in eos] for answer in tokens]
        return tokens

    def _stepping(self, cache: Cache, active: npt.NDArray[np.bool_] | None) -> Stepping:
        return Stepping(self._decode, self.graphs, self._embedding, cache, active)

    def _words(self, ids: Ints, positions: Ints, order: Ints) -> Tokens:
        """Text to run behind a cache, all [batch, seq]."""
        axes = self.graphs.text.position_axes
        if axes > 1:
            positions = np.broadcast_to(positions, (axes, *positions.shape))
        size = np.ones(order.shape, np.float32) if self.graphs.sized else None
        return Tokens(self._embedded(ids), positions, order, size, order if self.graphs.reaches else None)

    def _embedded(self, ids: Ints) -> Array:
        """Text as the language model takes it: [batch, seq, width]."""
        text = self.graphs.text
        found: Array = self._embedding[ids]
        return np.pad(found, ((0, 0), (0, 0), (0, text.width - text.hidden))) if text.planes else found

    def _parts(self, tokens: Tokens) -> Iterable[Tokens]:
        """A prompt in chunks; whole where prefill is a graph of its own, or where tokens see others behind them."""
        whole = self.graphs.prefill_apart or tokens.reach is not None
        if whole or self._chunk is None or tokens.order.shape[1] <= self._chunk:
            return [tokens]
        return tokens.in_prompt_order().chunks(self._chunk)

    def _chunks(self, tokens: Tokens) -> Iterable[Tokens]:
        return [tokens] if self._chunk_cached is None else tokens.chunks(self._chunk_cached)

    def _run(self, cache: Cache, tokens: Tokens) -> Logits:
        """The decode graph; puts what it returns into the cache."""
        runner = self._decode
        found, cache.past = runner.grow(self._feeds(runner, tokens), cache.past, tokens.order.shape[1])
        if self._shrinking is not None and cache.shrunk is not None:
            self._shrinking.ran(cache.shrunk, found)
        return _logits(runner, found)

    def _feeds(self, runner: Runner, tokens: Tokens) -> dict[str, Any]:
        check_longest(int(tokens.position_ids.max(initial=0)), self.graphs)
        feeds = {"inputs_embeds": tokens.embeds, "position_ids": tokens.position_ids, "order": tokens.order}
        if tokens.size is not None:
            feeds["size"] = tokens.size
        if tokens.reach is not None:
            feeds["reach"] = tokens.reach
        kinds = runner.inputs
        return {n: v if v.dtype == kinds.get(n) else self._as(runner, n, v) for n, v in feeds.items()}

    def _hand(self, value: Any, giver: Runner, taker: Runner) -> Any:
        """A device value for another runner: as it is between runners of one kind, else by way of the host."""
        return value if type(giver) is type(taker) else giver.numpy(value)

    def _as(self, runner: Runner, name: str, array: Array) -> Array:
        """In the type that the engine takes (an input it lacks is reported by the engine)."""
        dtype = runner.inputs.get(name)
        return array if dtype is None else array.astype(dtype, copy=False)


def _complete(runners: Mapping[str, Runner], graphs: GraphSet) -> dict[str, Runner]:
    """All the roles that the model has."""
    found = dict(runners)
    if not graphs.prefill_apart:
        for role, other in (("prefill", "decode"), ("decode", "prefill")):
            if role not in found and other in found:
                found[role] = found[other]
    absent = [role for roles in graphs.roles().values() for role in roles if role not in found]
    if absent:
        raise UsageError(f"No runner for {', '.join(absent)}. Given: {', '.join(runners) or 'none'}.")
    return found


def _check(runner: Runner, role: str, names: Sequence[str]) -> None:
    absent = [name for name in names if name not in runner.outputs]
    if absent:
        raise VerificationError(
            f"The engine for {role} has no output {', '.join(absent)}. Found: {', '.join(runner.outputs)}. "
            "Build it again."
        )


def _positive(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; expected 1 or more.")


def _logits(runner: Runner, found: Mapping[str, Any]) -> Logits:
    return runner.numpy(found["logits"]).astype(np.float32, copy=False)


def _ms(since: float) -> float:
    return (time.perf_counter() - since) * 1e3
