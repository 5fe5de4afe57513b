"""The same language model through other runtimes, as yardsticks. None is a dependency; what is missing is left out and said.

OpenVINO has no model builder of its own for a checkpoint: `transformers.exporters` makes its stateful model, OpenVINO GenAI runs
it.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks._common import timed
from exporter.backends._contract import Array


class Engine(Protocol):
    """Opened, greedy, end-of-sequence ignored, keys and values kept."""

    def prefill(self, ids: Array) -> float:
        """Milliseconds of a prompt int64 [tokens], its first token chosen."""

    def decode(self, ids: Array, steps: int) -> list[float]:
        """Milliseconds of each step behind the prompt; the first token belongs to prefill."""

    def tokens(self, ids: Array, count: int) -> list[int]:
        """What it says."""


def missing(*modules: str) -> str | None:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


class Torch:
    """Hugging Face's own classes. attention: "eager" or "sdpa"."""

    def __init__(self, llama: Path, attention: str) -> None:
        import torch
        from transformers import LlamaForCausalLM

        self._model: Any = LlamaForCausalLM.from_pretrained(
            llama, dtype=torch.float32, attn_implementation=attention
        ).eval()

    def prefill(self, ids: Array) -> float:
        import torch

        given = torch.from_numpy(ids)[None]
        with torch.inference_mode():
            return timed(lambda: self._model(input_ids=given, use_cache=True, logits_to_keep=1).logits.argmax())[0]

    def decode(self, ids: Array, steps: int) -> list[float]:
        marks: list[float] = []
        self._generate(ids, steps + 1, marks)
        return [1e3 * (b - a) for a, b in pairwise(marks[1:])]  # the first is the prompt's

    def tokens(self, ids: Array, count: int) -> list[int]:
        found: list[int] = self._generate(ids, count, [])[0, len(ids) :].tolist()
        return found

    def _generate(self, ids: Array, count: int, marks: list[float]) -> Any:
        import torch

        class Clock:
            def put(self, value: object) -> None:
                marks.append(time.perf_counter())

            def end(self) -> None:
                pass

        given = torch.from_numpy(ids)[None]
        with torch.inference_mode():
            return self._model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, eos_token_id=None,
                pad_token_id=0, streamer=Clock(),
            )  # fmt: skip


def _exported(llama: Path, kind: str, config: Any) -> Any:
    """What `transformers.exporters` makes of a checkpoint. The sample is padded, so that the mask stays an input."""
    import torch
    from transformers import LlamaForCausalLM, exporters

    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids = torch.randint(16, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    exporter = getattr(exporters, kind)()
    return exporter.export_for_generation(
        model, {"input_ids": ids, "attention_mask": mask}, config, multi_token_decode=True
    )


class Exporters:
    """`transformers.exporters` with its own fusions for ONNX Runtime's CPU provider, and its own runner. `folder` is written once."""

    def __init__(self, llama: Path, folder: Path, threads: int) -> None:
        import onnxruntime
        from transformers import AutoConfig
        from transformers.exporters import OnnxConfig
        from transformers.exporters.base import ExportedModel

        if not folder.exists():
            exported = _exported(llama, "OnnxExporter", OnnxConfig(dynamic=True, ort_fusions="cpu"))
            folder.mkdir(parents=True)
            exported.save_pretrained(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        opened = ExportedModel.from_pretrained(folder, device="cpu", session_options=options)
        self._run = opened.runners["decode"]
        self._config = AutoConfig.from_pretrained(llama)

    def prefill(self, ids: Array) -> float:
        return self._answer(ids, 1)[1][0]

    def decode(self, ids: Array, steps: int) -> list[float]:
        return self._answer(ids, steps + 1)[1][1:]

    def tokens(self, ids: Array, count: int) -> list[int]:
        return self._answer(ids, count)[0]

    def _answer(self, ids: Array, count: int) -> tuple[list[int], list[float]]:
        import torch
        from transformers import DynamicCache

        past, given = DynamicCache(config=self._config), torch.from_numpy(ids)[None]
        for layer in range(self._config.num_hidden_layers):
            empty = torch.empty(1, self._config.num_key_value_heads, 0, self._config.head_dim)
            past.update(empty, empty, layer)
        tokens, took = [], []
        for _ in range(count):
            mark = time.perf_counter()
            length = past.get_seq_length()
            seq = given.shape[1]
            named = {
                "input_ids": given, "attention_mask": torch.ones(1, length + seq, dtype=torch.int64),
                "position_ids": torch.arange(length, length + seq)[None], "past_key_values": past,
            }  # fmt: skip
            out = self._run(**{k: v for k, v in named.items() if k in self._run.metadata.kwargs})
            tokens.append(int(out.logits[0, -1].argmax()))
            past, given = out.past_key_values, torch.tensor([tokens[-1:]])
            took.append((time.perf_counter() - mark) * 1e3)
        return tokens, took


class OpenVinoGenai:
    """OpenVINO GenAI's pipeline over the stateful model of `transformers.exporters`, in FP32 with an FP32 cache. `folder` is written
    once."""

    def __init__(self, llama: Path, folder: Path, threads: int) -> None:
        self._ov: Any = importlib.import_module("openvino")
        self._genai: Any = importlib.import_module("openvino_genai")
        if not folder.exists():
            self._build(llama, folder)
        self._pipeline = self._genai.LLMPipeline(
            str(folder), "CPU", ATTENTION_BACKEND="SDPA", INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT="f32",
            KV_CACHE_PRECISION="f32",
        )  # fmt: skip

    def _build(self, llama: Path, folder: Path) -> None:
        from transformers import AutoTokenizer
        from transformers.exporters import OpenVINOConfig

        convert: Any = importlib.import_module("openvino_tokenizers").convert_tokenizer
        folder.mkdir(parents=True)
        program = _exported(llama, "OpenVINOExporter", OpenVINOConfig(dynamic=True)).components["decode"].program
        self._ov.save_model(program, folder / "openvino_model.xml", compress_to_fp16=False)
        tokenizer, detokenizer = convert(AutoTokenizer.from_pretrained(llama), with_detokenizer=True)
        self._ov.save_model(tokenizer, folder / "openvino_tokenizer.xml")
        self._ov.save_model(detokenizer, folder / "openvino_detokenizer.xml")
        (folder / "config.json").write_text((llama / "config.json").read_text())

    def prefill(self, ids: Array) -> float:
        marks: list[float] = []
        begin = time.perf_counter()
        self._generate(ids, 1, marks)
        return (marks[0] - begin) * 1e3

    def decode(self, ids: Array, steps: int) -> list[float]:
        marks: list[float] = []
        self._generate(ids, steps + 1, marks)
        return [1e3 * (b - a) for a, b in pairwise(marks)]

    def tokens(self, ids: Array, count: int) -> list[int]:
        found: list[int] = list(self._generate(ids, count, []).tokens[0])
        return found

    def _generate(self, ids: Array, count: int, marks: list[float]) -> Any:
        genai = self._genai

        class Clock(genai.StreamerBase):  # type: ignore[misc, name-defined]
            def write(self, token: object) -> Any:
                marks.append(time.perf_counter())
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        tensor = self._ov.Tensor
        given = genai.TokenizedInputs(tensor(ids[None].astype(np.int64)), tensor(np.ones((1, len(ids)), np.int64)))
        clock: Callable[..., Any] = Clock()
        return self._pipeline.generate(given, max_new_tokens=count, ignore_eos=True, streamer=clock)
