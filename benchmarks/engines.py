"""Prefill and decode of one language model on a CPU: our graphs, plain and in the flavour of the CPU profiles, beside other
runtimes.

    python -m benchmarks.engines --precision fp32      # or int4

Two models: a random Llama of 16 layers of hidden size 1024 (2,080 and 288 tokens of prompt), and the language model of the
embedded VLM with its trained weights (96 tokens). Every engine runs the same weights on as many tokens, in turn, in one
process; ours gets 32 of them as text and the others as visual embeddings. Then 64 tokens, greedily. All are opened twice, in
this order and in the reverse, with as many rounds each: whichever a process opens first decodes some percent slower. In FP32
all other engines have to say the same as PyTorch, and ours the same logits (`benchmarks.prefill` compares them).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _common, _genai, _others
from benchmarks._common import Case, Model, Ratio
from benchmarks._others import Engine
from exporter.backends._contract import Array
from exporter.embedded import CHECKPOINT
from exporter.graphset import GraphSet
from exporter.runtime.generate import Generator, Visual, embedding

OURS, PLAIN = "EdgeTrim", "EdgeTrim, plain graph"
TEXT = 32


@dataclass(frozen=True)
class Subject:
    """name: in the record. llava, llama: its checkpoint, and its language model alone. prompts: tokens in all."""

    name: str
    llava: Path
    llama: Path
    vocab: int
    prompts: tuple[int, ...]
    new_tokens: int = 64


class Ours:
    """Our generator on a prompt with as many visual tokens as there is room for."""

    def __init__(self, stack: ExitStack, files: Path, graphs: GraphSet, decode: Path, threads: int) -> None:
        self._graphs = replace(graphs, text=replace(graphs.text, eos=[]))
        llm = stack.enter_context(_common.runner(decode, threads))
        vision = stack.enter_context(_common.runner(files / "vision.onnx", threads))
        reduce = stack.enter_context(_common.runner(files / "reduce.onnx", threads))
        runners = {"vision": vision, "reduce": reduce, "prefill": llm, "decode": llm}
        self._table = embedding(files, graphs)
        self._runners = runners
        self._generators: dict[int, Generator] = {}

    def prefill(self, ids: Array) -> float:
        generator, visual, prompt = self._given(ids)
        return _common.timed(lambda: generator.prefill(visual, [prompt]).logits.argmax())[0]

    def decode(self, ids: Array, steps: int) -> list[float]:
        generator, visual, prompt = self._given(ids)
        return generator.answer(visual, [prompt], steps + 1).timings.decode_ms

    def tokens(self, ids: Array, count: int) -> list[int]:
        generator, visual, prompt = self._given(ids)
        return generator.answer(visual, [prompt], count).tokens[0]

    def _given(self, ids: Array) -> tuple[Generator, Visual, list[int]]:
        """The last `TEXT` ids are text; those before are given as visual tokens, by their rows of the embedding table."""
        count, text = len(ids) - TEXT, self._graphs.text
        if count not in self._generators:
            layout = replace(
                self._graphs.visual,
                total=count,
                kept=count,
                placeholders=1,
                span=count,
                ids=[[i] for i in range(count)],
            )
            self._generators[count] = Generator(self._runners, replace(self._graphs, visual=layout), self._table)
        visual = Visual(np.asarray(self._table[ids[:count]], np.float32)[None], np.arange(count)[None])
        return self._generators[count], visual, [text.image_token, *ids[count:].tolist()]


def subjects(folder: Path) -> list[Subject]:
    """The random decoder, and the embedded model."""
    import torch
    from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

    model = Model()
    llava, llama = _common.checkpoint(folder / "random", model)
    whole = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    with torch.device("meta"):
        alone = LlamaForCausalLM(whole.config.text_config)
    alone.model, alone.lm_head = whole.model.language_model, whole.lm_head
    alone.save_pretrained(folder / "embedded")
    _common.tokenizer(folder / "embedded", whole.config.text_config.vocab_size)
    return [
        Subject("random, hidden 1024, 16 layers", llava, llama, model.vocab, (2080, 288)),
        Subject("embedded", Path(CHECKPOINT), folder / "embedded", whole.config.text_config.vocab_size, (96,)),
    ]


def engines(
    subject: Subject, folder: Path, precision: str, threads: int, beside: Sequence[str], log: Callable[[str], None]
) -> tuple[dict[str, Callable[[ExitStack], Engine]], dict[str, str]]:
    """Name → what opens the engine, its files being there, and for those that are left out, why. beside: names of the others;
    empty is all."""
    log("exporting")
    _, graphs = _common.export(subject.llava, folder / "ours", (), 1, precision)
    files = folder / "ours" / "graphs"
    found: dict[str, Callable[[ExitStack], Engine]] = {
        OURS: lambda stack: Ours(stack, files, graphs, files / graphs.files["decode"], threads),
        PLAIN: lambda stack: Ours(stack, files, graphs, files / "decode.onnx", threads),
    }
    others: dict[str, tuple[str | None, Callable[[], Engine]]] = {
        "onnxruntime-genai": (_genai.missing(), lambda: _built(subject.llama, folder / "genai", precision, threads)),
    }
    if precision == "fp32":
        packages = ("openvino", "openvino_genai", "openvino_tokenizers")
        others |= {
            "OpenVINO GenAI": (
                _others.missing(*packages),
                lambda: _others.OpenVinoGenai(subject.llama, folder / "openvino", threads),
            ),
            "transformers.exporters, ONNX Runtime": (
                _others.missing("transformers.exporters"),
                lambda: _others.Exporters(subject.llama, folder / "exporters", threads),
            ),
            "transformers, eager": (None, lambda: _others.Torch(subject.llama, "eager")),
            "transformers, SDPA": (None, lambda: _others.Torch(subject.llama, "sdpa")),
        }
    notes = {name: why for name, (why, _) in others.items() if why and (not beside or name in beside)}
    for name, (why, opened) in others.items():
        if not why and (not beside or name in beside):
            log(f"building {name}")
            try:
                opened()
            except Exception as e:
                notes[name] = f"does not take this model: {type(e).__name__}: {str(e).splitlines()[0][:200]}"
            else:
                found[name] = lambda stack, opened=opened: opened()  # type: ignore[misc]
    return found, notes


def _built(llama: Path, folder: Path, precision: str, threads: int) -> Engine:
    if not folder.exists():
        _genai.build(llama, folder, precision)
    return _genai.Genai(folder, threads)


def measure(
    subject: Subject, folder: Path, precision: str, rounds: int, threads: int, load: _common.Load,
    beside: Sequence[str] = (), log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """One model's part of the record."""
    import torch

    torch.set_num_threads(threads)
    log(subject.name)
    opening, notes = engines(subject, folder, precision, threads, beside, log)
    rng = np.random.default_rng(1)
    prompts = {n: rng.integers(min(16, subject.vocab // 2), subject.vocab, n) for n in subject.prompts}
    last, steps = prompts[subject.prompts[-1]], subject.new_tokens - 1
    samples: dict[str, list[Sequence[float]]] = {}
    said: dict[str, list[int]] = {}
    for order in (list(opening), list(opening)[::-1]):
        with ExitStack() as stack:
            cases = []
            for name in order:
                engine = opening[name](stack)
                for n, ids in prompts.items():
                    repeats = max(1, min(5, 600 // n))
                    cases.append(Case.one(f"prefill {n}: {name}", partial(_prefills, engine, ids, repeats)))
                cases.append(Case.one(f"decode: {name}", partial(engine.decode, last, steps)))
                said[name] = engine.tokens(last, 16)
            for name, parts in _common.interleave(cases, rounds, load, log=log).items():
                samples.setdefault(name, []).extend(parts)
            cases.clear()
            del engine
    kinds = [f"prefill {n}" for n in subject.prompts] + ["decode"]
    against = {
        kind: {
            name: asdict(Ratio.of(samples, f"{kind}: {name}", f"{kind}: {OURS}")) for name in opening if name != OURS
        }
        for kind in kinds
    }
    first = said[OURS]
    return {
        "times": _common.times(samples), "against": against, "notes": notes, "flavoured": OURS,
        "says_the_same": {name: tokens == first for name, tokens in said.items()},
    }  # fmt: skip


def _prefills(engine: Engine, ids: Array, times: int) -> list[float]:
    return [engine.prefill(ids) for _ in range(times)]


def text(entry: Mapping[str, Any]) -> str:
    """The record as tables."""
    parts = []
    for name, part in entry["models"].items():
        kinds = list(part["against"])
        rows = []
        for engine in (OURS, *part["against"][kinds[0]]):
            row = [engine]
            for kind in kinds:
                ms = part["times"][f"{kind}: {engine}"]["median_ms"]
                ratio = part["against"][kind].get(engine)
                row += [f"{ms:.1f}" if ms < 1000 else f"{ms:.0f}", Ratio(**ratio) if ratio else ""]
            rows.append([*row, "yes" if part["says_the_same"][engine] else "no"])
        header = ["engine", *(h for kind in kinds for h in (f"{kind}, ms", "÷ ours (range)")), "same 16 tokens"]
        parts += [f"**{name}**", _common.table(rows, header)]
        parts += [f"{engine}: {why}" for engine, why in part["notes"].items()]
    return "\n\n".join([*parts, _common.footer(entry)])


def main() -> None:
    parser = _common.options(__doc__, rounds=5)
    parser.add_argument("--only", choices=("random", "embedded"), help="one of the two models")
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="ENGINE", help="the other engines, by name; default: all"
    )
    args = parser.parse_args()
    _common.quiet()
    load, found = _common.Load(args.patience), {}
    with tempfile.TemporaryDirectory(prefix="edgetrim-") as scratch:
        for subject in subjects(Path(scratch)):
            if args.only is None or subject.name.startswith(args.only):
                folder = Path(scratch) / subject.name.partition(",")[0] / "engines"
                found[subject.name] = measure(
                    subject, folder, args.precision, args.rounds, args.threads, load, args.beside, _common.say
                )
    settings = {"rounds": args.rounds, "threads": args.threads, "text_tokens": TEXT, "beside": args.beside}
    entry = _common.record("engines", args.precision, Model(), settings, {"models": found}, load)
    print(text(entry))
    print(_common.write(args.results, entry))


if __name__ == "__main__":
    main()
