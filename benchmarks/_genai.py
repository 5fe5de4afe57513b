"""The same language model through onnxruntime-genai, as a yardstick: its own builder, graphs and generation loop.

Not a dependency. Beside onnxruntime-gpu, install it without its own: `pip install --no-deps onnxruntime-genai`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import timed
from exporter.backends._contract import Array


def missing() -> str | None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return "not installed (pip install --no-deps onnxruntime-genai)"
    return None


def build(llama: Path, folder: Path, precision: str) -> None:
    """Run its model builder. INT4 as in our export: symmetric blocks of 128, LM head in FP32, activations in INT8 at run time.

    Raises:
        RuntimeError: the builder failed, with the last line it wrote.
    """
    command = [
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(llama), "-o", str(folder), "-p", precision,
        "-e", "cpu", "-c", str(folder.with_suffix(".cache")),
    ]  # fmt: skip
    if precision == "int4":
        command += ["--extra_options", "block_size=128", "accuracy_level=4", "nodes_to_exclude=/lm_head/MatMul"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"onnxruntime-genai's model builder failed: {lines[-1]}")


class Genai:
    """An opened model. Creating a generator, which allocates the KV cache, is never timed."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._og: Any = importlib.import_module("onnxruntime_genai")
        self._og.disable_telemetry_events()
        config = self._og.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = self._og.Model(config)

    def _generator(self, length: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        return self._og.Generator(self._model, params)

    def prefill(self, ids: Array) -> float:
        """Milliseconds of the prompt `ids` [tokens], its first token chosen."""
        generator = self._generator(len(ids) + 1)

        def call() -> None:
            generator.append_tokens(ids.astype(np.int32)[None])
            generator.generate_next_token()

        return timed(call)[0]

    def logits(self, ids: Array) -> Array:
        """Of the last token: [vocab]."""
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(ids.astype(np.int32)[None])
        last: Array = np.array(generator.get_logits())[0, -1]
        return last

    def decode(self, ids: Array, steps: int) -> list[float]:
        """Milliseconds per step behind the prompt `ids` [tokens]; the first token, which belongs to prefill, is not among them."""
        generator = self._generator(len(ids) + steps + 1)
        generator.append_tokens(ids.astype(np.int32)[None])
        generator.generate_next_token()
        return timed(generator.generate_next_token, steps)

    def tokens(self, ids: Array, count: int) -> list[int]:
        """What it says."""
        generator = self._generator(len(ids) + count)
        generator.append_tokens(ids.astype(np.int32)[None])
        while not generator.is_done():
            generator.generate_next_token()
        found: list[int] = np.asarray(generator.get_sequence(0))[len(ids) :].tolist()
        return found
