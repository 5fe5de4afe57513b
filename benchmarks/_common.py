"""What the benchmarks share: random checkpoints, exports of them, interleaved timing, records."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from exporter import device, pipeline
from exporter.backends import ort
from exporter.backends._contract import Array
from exporter.graphset import GraphSet
from exporter.job import Job
from exporter.stages import bench
from exporter.workspace import Workspace

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("fp32", "int4")
PAUSE_S = 0.05
"""Between two measurements: worker threads of the engine before stop spinning."""


@dataclass(frozen=True)
class Model:
    """Shape of a random LLaVA checkpoint. The tower is as wide as CLIP-L, since selection works at that width, but has
    one block: it is not what is measured."""

    hidden: int = 1024
    layers: int = 16
    intermediate: int = 2816
    heads: int = 16
    kv_heads: int = 4
    vocab: int = 32000
    tower: int = 1024
    tower_heads: int = 16
    image: int = 224
    patch: int = 14

    @property
    def tokens(self) -> int:
        """Visual tokens of a frame."""
        return (self.image // self.patch) ** 2


IMAGE_TOKEN = 5
FIRST_WORD = 16
"""Token ids below are kept for special tokens."""


def checkpoint(folder: Path, model: Model) -> tuple[Path, Path]:
    """Save a random LLaVA and, apart, its language model with the same weights: both BF16, by Hugging Face's classes."""
    import torch
    from transformers import LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    text = dict(
        model_type="llama", hidden_size=model.hidden, intermediate_size=model.intermediate, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, vocab_size=model.vocab, rms_norm_eps=1e-5,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    vision = dict(
        model_type="clip_vision_model", hidden_size=model.tower, intermediate_size=4 * model.tower, num_hidden_layers=2,
        num_attention_heads=model.tower_heads, image_size=model.image, patch_size=model.patch,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=model.tokens,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    with torch.device("meta"):
        llama = LlamaForCausalLM(llava.config.text_config)
    llama.model, llama.lm_head = llava.model.language_model, llava.lm_head
    for name, whole in (("llava", llava), ("llama", llama)):
        whole.save_pretrained(folder / name)
        tokenizer(folder / name, model.vocab)
    return folder / "llava", folder / "llama"


def tokenizer(folder: Path, vocab: int) -> None:
    """Save one that nothing is asked of: words w0, w1, …"""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2")
    made.save_pretrained(folder)


def export(llava: Path, folder: Path, reductions: Sequence[str], frames: int, precision: str) -> tuple[Job, GraphSet]:
    """Export through the pipeline; the graphs lie in `folder`/graphs."""
    job = Job(str(llava), tuple(reductions), f"cpu_{precision}", frames)
    folder.mkdir(parents=True)
    return job, pipeline.run_export(job, Workspace(folder))


def load_llama(folder: Path) -> Any:
    """Hugging Face's own model in FP32."""
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompt(model: Model, frames: int, text: int, seed: int = 0) -> list[int]:
    """`text` random words with one image token per frame behind the first two."""
    words = np.random.default_rng(seed).integers(FIRST_WORD, model.vocab, text).tolist()
    return [*words[:2], *[IMAGE_TOKEN] * frames, *words[2:]]


def pixels(model: Model, frames: int, seed: int = 0) -> Array:
    noise = np.random.default_rng(seed).normal(size=(1, frames, 3, model.image, model.image))
    return noise.astype(np.float32)


def runner(graph: Path, threads: int) -> Any:
    return ort.OnnxRuntime(threads=threads).runner(graph, repeats=graph.name.startswith("decode"))


def cosine(a: Array, b: Array) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Something to time: `run` returns milliseconds, a list for each of `names`."""

    names: tuple[str, ...]
    run: Callable[[], Sequence[Sequence[float]]]

    @classmethod
    def one(cls, name: str, run: Callable[[], Sequence[float]]) -> Case:
        return cls((name,), lambda: [run()])


def timed(call: Callable[[], object], repeats: int = 1) -> list[float]:
    """Milliseconds of each of `repeats` calls."""
    found = []
    for _ in range(repeats):
        mark = time.perf_counter()
        call()
        found.append((time.perf_counter() - mark) * 1e3)
    return found


Samples = Mapping[str, Sequence[Sequence[float]]]
"""Case → round → milliseconds."""


class Load:
    """What other programs take of the machine's processors, from /proc; 0 where that is missing."""

    limit = 0.2
    """A case with more than this is disturbed."""

    def __init__(self, patience_s: float = 0.0) -> None:
        self.patience_s = patience_s
        self._others = self._all = 0.0

    @property
    def share(self) -> float:
        """Over all measurements that counted."""
        return round(self._others / self._all, 3) if self._all else 0.0

    def undisturbed(self, run: Callable[[], Sequence[Sequence[float]]]) -> Sequence[Sequence[float]]:
        """Run, and again as long as others disturb it and there is patience left."""
        while True:
            begin = time.monotonic()
            while self.patience_s > time.monotonic() - begin and self._measure(lambda: time.sleep(2.0))[1] > self.limit:
                pass
            samples: list[Sequence[Sequence[float]]] = []
            seconds, share = self._measure(lambda found=samples: found.append(run()))  # type: ignore[misc]
            if share > self.limit and (spent := time.monotonic() - begin) < self.patience_s:
                self.patience_s -= spent
                continue
            self._others, self._all = self._others + share * seconds, self._all + seconds
            return samples[0]

    def _measure(self, call: Callable[[], object]) -> tuple[float, float]:
        """Processor seconds that there were meanwhile, and the share of them that others took."""
        before = self._seconds()
        call()
        mine, busy, total = (b - a for a, b in zip(before, self._seconds(), strict=True))
        return total, max(0.0, busy - mine) / total if total else 0.0

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """Processor time of this process, of all, and that there was."""
        with contextlib.suppress(OSError):
            ticks = [int(t) for t in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
            tick, idle = os.sysconf("SC_CLK_TCK"), ticks[3] + ticks[4]
            return time.process_time(), (sum(ticks) - idle) / tick, sum(ticks) / tick
        return 0.0, 0.0, 0.0


def interleave(
    cases: Sequence[Case], rounds: int, load: Load, warmup: int = 1, log: Callable[[str], None] = lambda text: None
) -> Samples:
    """Run all cases in every round, forwards and backwards in turn, so that the machine's mood hits all alike."""
    found: dict[str, list[list[float]]] = {name: [] for case in cases for name in case.names}
    for i in range(warmup + rounds):
        begin = time.perf_counter()
        for case in cases if i % 2 else reversed(cases):
            time.sleep(PAUSE_S)
            if i < warmup:
                case.run()
                continue
            for name, ms in zip(case.names, load.undisturbed(case.run), strict=True):
                found[name].append(list(ms))
        log(f"round {i + 1} of {warmup + rounds}: {time.perf_counter() - begin:.0f} s")
    return found


def times(samples: Samples) -> dict[str, Any]:
    """Median, p90 and p99 over all samples of a case."""
    return {name: asdict(bench.timing([ms for part in parts for ms in part])) for name, parts in samples.items()}


@dataclass(frozen=True)
class Ratio:
    """Of two cases, round by round (the medians of each): its median over the rounds, and its range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Samples, above: str, below: str, scale: float = 1.0) -> Ratio:
        pairs = zip(samples[above], samples[below], strict=True)
        found = [scale * float(np.median(a)) / float(np.median(b)) for a, b in pairs]
        return cls(float(np.median(found)), min(found), max(found))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}–{self.high:.3g})"


def peak_rss_mib() -> float | None:
    """The most memory that this process has held."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:"))
    return None


# --- records ----------------------------------------------------------------------------------------------------------


def options(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the language model's weights")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2, help="for every engine alike")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait in all for other programs to rest")
    parser.add_argument("--no-genai", action="store_true", help="leave onnxruntime-genai out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON record")
    return parser


def quiet() -> None:
    """Warnings and progress bars of the frameworks say nothing about the numbers."""
    from transformers.utils import logging as theirs

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


def record(
    benchmark: str, precision: str, model: Model, settings: Mapping[str, Any], found: Mapping[str, Any], load: Load
) -> dict[str, Any]:
    versions = device.versions()
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["onnxruntime-genai"] = metadata.version("onnxruntime-genai")
    return {
        "benchmark": benchmark,
        "command": f"python -m benchmarks.{benchmark} --precision {precision} --rounds {settings['rounds']} --threads {settings['threads']}",
        "precision": precision,
        "machine": device.machine(),
        "others_share": load.share,
        "peak_rss_mib": peak_rss_mib(),
        "versions": versions,
        "model": asdict(model),
        **settings,
        **found,
    }


def write(folder: Path, entry: Mapping[str, Any]) -> Path:
    """benchmark-precision-date-host.json"""
    machine = entry["machine"]
    host = f"{platform.machine().lower()}-{machine['cores']}cores"
    path = folder / f"{entry['benchmark']}-{entry['precision']}-{machine['utc'][:10]}-{host}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """A Markdown table."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def footer(entry: Mapping[str, Any]) -> str:
    """Device, threads, precision, and how undisturbed the run was."""
    machine = entry["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {entry['threads']} threads, {entry['precision']}, "
        f"{100 * entry['others_share']:.0f} % of the processors used by others, {machine['utc']} UTC"
    )


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)
