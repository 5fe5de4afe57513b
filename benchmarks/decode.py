"""Time per output token of our generator, against a bare loop on the same graph, onnxruntime-genai and transformers.

    python -m benchmarks.decode --precision int4

All in one process and in turn: a prompt of 32 text and 256 visual tokens, then 64 tokens, greedily, end-of-sequence
ignored. The bare loops do the least that generates: look the embedding up, run the session, take the best logit, feed
keys and values back. One passes numpy arrays; the other `OrtValue`s, which never become numpy, as the generator does.
They take turns with the generator step by step, on its session; the other engines answer by answer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _common, _genai
from benchmarks._common import Case, Model, Ratio
from exporter.backends._contract import Array
from exporter.graphset import GraphSet
from exporter.runtime.generate import Generator, embedding

OURS, BARE, VALUES = "EdgeTrim generator", "bare session loop", "bare session loop, OrtValues"
HF, GENAI = "transformers generate, PyTorch", "onnxruntime-genai"


@dataclass(frozen=True)
class Setting:
    frames: int = 8
    text: int = 32
    reductions: tuple[str, ...] = ("lftr:temporal=similarity,keep_frames=4,spatial=topic,keep=64",)
    new_tokens: int = 64


def main() -> None:
    args = _common.options(__doc__, rounds=7).parse_args()
    _common.quiet()
    with tempfile.TemporaryDirectory(prefix="edgetrim-") as scratch:
        entry = measure(
            Path(scratch), Model(), Setting(), args.precision, args.rounds, args.threads, _common.Load(args.patience),
            not args.no_genai, _common.say,
        )  # fmt: skip
    print(text(entry))
    print(_common.write(args.results, entry))


def measure(
    folder: Path, model: Model, setting: Setting, precision: str, rounds: int, threads: int, load: _common.Load,
    genai: bool = True, log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """The record. `folder` takes some gigabytes."""
    import torch

    torch.set_num_threads(threads)
    log("writing the checkpoint")
    llava, llama = _common.checkpoint(folder / "checkpoint", model)
    prompt = _common.prompt(model, setting.frames, setting.text)
    images = _common.pixels(model, setting.frames)
    steps = setting.new_tokens - 1  # the first token is prefill's
    notes: dict[str, str] = {}
    with ExitStack() as stack:
        log("exporting")
        _, graphs = _common.export(llava, folder / "export", setting.reductions, setting.frames, precision)
        endless = replace(graphs, text=replace(graphs.text, eos=[]))
        files = folder / "export" / "graphs"
        llm = stack.enter_context(_common.runner(files / "decode.onnx", threads))
        runners = {
            role: stack.enter_context(_common.runner(files / f"{role}.onnx", threads)) for role in ("vision", "reduce")
        }
        table = embedding(files, graphs)
        generator = Generator({**runners, "prefill": llm, "decode": llm}, endless, table)
        bare = Bare(llm._session, graphs, table)
        seen = generator.reduce(generator.vision(images)).embeds
        words = [t for t in prompt if t != graphs.text.image_token]
        embeds = np.concatenate([seen, np.asarray(table[words], np.float32)[None]], 1)
        cases = [
            Case(
                (OURS, BARE, VALUES), lambda: _side_by_side(generator, bare, images, prompt, embeds, setting.new_tokens)
            )
        ]
        ids = np.random.default_rng(1).integers(_common.FIRST_WORD, model.vocab, embeds.shape[1:2])
        if precision == "fp32":
            theirs = _common.load_llama(llama)
            cases.append(Case.one(HF, lambda: _hugging_face(theirs, ids, setting.new_tokens)))
        if genai and (why := _genai.missing()) is None:
            log("building with onnxruntime-genai")
            _genai.build(llama, folder / "genai", precision)
            opened = _genai.Genai(folder / "genai", threads)
            cases.append(Case.one(GENAI, lambda: opened.decode(ids, steps)))
        else:
            notes[GENAI] = why if genai and why else "left out"
        samples = _common.interleave(cases, rounds, load, log=log)
    found = {
        "times": _common.times(samples),
        "against": {name: asdict(Ratio.of(samples, name, OURS)) for name in samples if name != OURS},
        "generator_over_bare": asdict(Ratio.of(samples, OURS, BARE)),
        "generator_over_values": asdict(Ratio.of(samples, OURS, VALUES)),
        "notes": notes,
    }
    settings = {
        "rounds": rounds, "threads": threads, "prompt_tokens": embeds.shape[1], "new_tokens": setting.new_tokens,
        "reductions": list(setting.reductions),
    }  # fmt: skip
    return _common.record("decode", precision, model, settings, found, load)


def _side_by_side(
    generator: Generator, bare: Bare, images: Array, prompt: list[int], embeds: Array, new_tokens: int
) -> list[list[float]]:
    """Milliseconds per step of the generator and the two loops, which run a step each after every token of its."""
    loops = [bare.decode(embeds), bare.decode_values(embeds)]
    times: list[list[float]] = [[] for _ in loops]

    def step(row: int, token: int) -> None:
        for found, loop in zip(times, loops, strict=True):
            found.append(next(loop))

    ours = generator.generate(images, [prompt], new_tokens, on_token=step).timings.decode_ms
    return [ours, *(found[1:] for found in times)]  # the first includes the prompt


class Bare:
    """A session driven by hand: the generator's own, as the worker threads of a second one would spin in its way."""

    def __init__(self, session: Any, graphs: GraphSet, table: Array) -> None:
        import onnxruntime

        self._session = session
        self._value: Any = onnxruntime.OrtValue.ortvalue_from_numpy
        self._outputs = [o.name for o in self._session.get_outputs()]
        inputs = [i.name for i in self._session.get_inputs()]
        self._past = [(name, "present" + name[4:]) for name in inputs if name.startswith("past_")]
        self._table, self._text = table, graphs.text

    def decode(self, embeds: Array) -> Iterator[float]:
        """Milliseconds of the prompt's embeddings [1, seq, hidden], then of each step."""
        feeds, place = self._start(embeds), embeds.shape[1]
        while True:
            mark = time.perf_counter()
            found = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
            token, at = int(found["logits"].argmax()), np.array([[place]])
            feeds = {"inputs_embeds": self._table[token][None, None], "position_ids": at, "order": at}
            for past, present in self._past:
                feeds[past] = found[present]
            place += 1
            yield (time.perf_counter() - mark) * 1e3

    def decode_values(self, embeds: Array) -> Iterator[float]:
        """The same, with keys and values that never become numpy arrays."""
        feeds, place = {name: self._value(value) for name, value in self._start(embeds).items()}, embeds.shape[1]
        while True:
            mark = time.perf_counter()
            found = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, feeds), strict=True))
            token, at = int(found["logits"].numpy().argmax()), self._value(np.array([[place]]))
            row = self._value(np.array(self._table[token][None, None]))
            feeds = {"inputs_embeds": row, "position_ids": at, "order": at}
            for past, present in self._past:
                feeds[past] = found[present]
            place += 1
            yield (time.perf_counter() - mark) * 1e3

    def _start(self, embeds: Array) -> dict[str, Array]:
        places = np.arange(embeds.shape[1])[None]
        feeds: dict[str, Array] = {"inputs_embeds": embeds, "position_ids": places, "order": places}
        for past, _ in self._past:
            order = past.startswith("past_order_")
            feeds[past] = (
                np.empty((1, 0), np.int64)
                if order
                else np.empty((1, self._text.kv_heads, 0, self._text.head_dim), embeds.dtype)
            )
        return feeds


class _Clock:
    """A streamer for `generate`: notes when each token comes."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, value: object) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass


def _hugging_face(model: Any, ids: Array, new_tokens: int) -> list[float]:
    import torch

    clock = _Clock()
    given = torch.from_numpy(ids)[None]
    with torch.inference_mode():
        model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
            pad_token_id=0, streamer=clock,
        )  # fmt: skip
    return [1e3 * (b - a) for a, b in pairwise(clock.marks[1:])]  # the first is the prompt's


def text(entry: Mapping[str, Any]) -> str:
    """The record as a table."""
    rows = []
    for name, t in entry["times"].items():
        against = entry["against"].get(name)
        rows.append([name, f"{t['median_ms']:.2f}", f"{t['p90_ms']:.2f}", Ratio(**against) if against else ""])
    parts = [
        _common.table(rows, ["engine", "ms per token, median", "p90", "time ÷ ours (range)"]),
        f"generator ÷ bare session loop: {Ratio(**entry['generator_over_bare'])}",
        f"generator ÷ bare OrtValue loop: {Ratio(**entry['generator_over_values'])}",
        *(f"{name}: {why}" for name, why in entry["notes"].items()),
        _common.footer(entry),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
