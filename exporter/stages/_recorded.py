"""The PyTorch reference on file: what it made of a few samples, so that a machine without PyTorch can compare with it.

`validate` on the machine that exported records while it compares; on the device the recording answers in its place, stage by stage,
with the same numbers in float32.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from exporter.backends._contract import Array
from exporter.errors import UsageError, VerificationError
from exporter.runtime.cache import Cache
from exporter.runtime.generate import Prefilled, Visual
from exporter.runtime.sampling import Logits
from exporter.runtime.sequence import Ints, Prompts, Text

FILE = "evidence/reference.npz"
ROOM = 64 * 2**20
"""Bytes of arrays that are recorded, before compression; the first sample always is."""
LARGEST = 4 * 2**30
"""Bytes of arrays that are read back."""

Sample = dict[str, Array]
"""One sample: `pixel_values`, `prompt`, and under `side.`, `signal.`, `visual.`, `handed.`, `kept.` what stages take and gave;
`aligned_text` where a graph reads the question; `logits` float32 [steps, vocab], those of prefill first."""


class Reference(Protocol):
    """What fidelity asks of the PyTorch modules: `Generator`'s stages."""

    def vision(self, pixel_values: Array) -> Mapping[str, Any]: ...

    def question(self, question_ids: Array) -> Array: ...

    def reduce(
        self, signals: Mapping[str, Any], text: Text | None = None, side: Mapping[str, Array] | None = None
    ) -> Visual: ...

    def prefill(self, visual: Visual, input_ids: Prompts, text: Text | None = None) -> Prefilled: ...

    def step(self, cache: Cache, tokens: Ints) -> Logits: ...


@dataclass
class Recorder:
    """Passes everything on to the reference, and keeps what it gave as long as there is room."""

    reference: Reference
    room: int = ROOM
    samples: list[Sample] = field(default_factory=list)
    _now: Sample = field(default_factory=dict)
    _logits: list[Array] = field(default_factory=list)

    def begin(self, pixel_values: Array, prompt: Sequence[int], side: Mapping[str, Array]) -> None:
        self._now = {"pixel_values": np.asarray(pixel_values), "prompt": np.asarray(prompt, np.int64)}
        self._keep("side", side)
        self._logits = []

    def end(self) -> None:
        self._now["logits"] = np.concatenate(self._logits)
        size = sum(value.nbytes for value in self._now.values())
        if not self.samples or size <= self.room:
            self.samples.append(self._now)
            self.room -= size
        else:
            self.room = 0  # later samples are not smaller by much: the first ones it is

    def vision(self, pixel_values: Array) -> Mapping[str, Any]:
        found = self.reference.vision(pixel_values)
        self._keep("signal", found)
        return found

    def question(self, question_ids: Array) -> Array:
        found = self.reference.question(question_ids)
        self._now["aligned_text"] = found
        return found

    def reduce(
        self, signals: Mapping[str, Any], text: Text | None = None, side: Mapping[str, Array] | None = None
    ) -> Visual:
        found = self.reference.reduce(signals, text, side)
        size = {} if found.size is None else {"size": found.size}
        self._keep("visual", {"embeds": found.embeds, "index": found.index, **size})
        self._keep("handed", found.signals)
        return found

    def prefill(self, visual: Visual, input_ids: Prompts, text: Text | None = None) -> Prefilled:
        found = self.reference.prefill(visual, input_ids, text)
        self._keep("kept", found.kept)
        self._logits.append(found.logits)
        return found

    def step(self, cache: Cache, tokens: Ints) -> Logits:
        found = self.reference.step(cache, tokens)
        self._logits.append(found)
        return found

    def _keep(self, group: str, values: Mapping[str, Any]) -> None:
        self._now |= {f"{group}.{name}": np.asarray(value) for name, value in values.items()}


class Recording:
    """Answers as the reference did, sample after sample in the order of `samples`."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self._rest = iter(samples)
        self._now: Sample = {}
        self._step = 0

    def vision(self, pixel_values: Array) -> Mapping[str, Any]:
        self._now = next(self._rest)
        return self._group("signal")

    def question(self, question_ids: Array) -> Array:
        return self._now["aligned_text"]

    def reduce(
        self, signals: Mapping[str, Any], text: Text | None = None, side: Mapping[str, Array] | None = None
    ) -> Visual:
        found = self._group("visual")
        return Visual(found["embeds"], found["index"], found.get("size"), self._group("handed"))

    def prefill(self, visual: Visual, input_ids: Prompts, text: Text | None = None) -> Prefilled:
        self._step = 0
        nowhere = np.zeros(1, np.int64)
        return Prefilled(self._now["logits"][:1], Cache({}, nowhere, nowhere, [[]]), self._group("kept"))

    def step(self, cache: Cache, tokens: Ints) -> Logits:
        self._step += 1
        if self._step >= len(self._now["logits"]):
            raise VerificationError("The recorded reference ends before its own last token. Copy the bundle again.")
        return self._now["logits"][self._step : self._step + 1]

    def _group(self, name: str) -> dict[str, Array]:
        return group(self._now, name)


def group(sample: Sample, name: str) -> dict[str, Array]:
    """Those of a sample's arrays that stand under a name, without it."""
    return {key.removeprefix(f"{name}."): value for key, value in sample.items() if key.startswith(f"{name}.")}


def save(samples: Sequence[Sample], path: Path) -> None:
    """Write beside, then rename. The same samples give the same bytes."""
    beside = path.with_name(f".{path.name}.new.npz")
    arrays = {f"{number}/{key}": value for number, sample in enumerate(samples) for key, value in sample.items()}
    try:
        np.savez_compressed(beside, allow_pickle=False, **arrays)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path) -> list[Sample]:
    """Read a recording.

    Raises:
        UsageError: there is none. VerificationError: it is damaged.
    """
    if not path.is_file():
        raise UsageError(
            f"There is no {path}, which fidelity is compared with on a machine without PyTorch. Run `edgetrim validate` where the "
            "model was exported; it becomes part of the bundle."
        )
    samples: dict[int, Sample] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > LARGEST:
            raise ValueError(f"it holds {size} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                number, _, key = name.partition("/")
                samples.setdefault(int(number), {})[key] = arrays[name]
        for sample in samples.values():
            sample["pixel_values"], sample["prompt"], sample["logits"]
    except Exception as e:  # zipfile, zlib and numpy have no error in common
        raise VerificationError(f"{path} cannot be read ({type(e).__name__}: {e}). Copy the bundle again.") from e
    return [samples[number] for number in sorted(samples)]
