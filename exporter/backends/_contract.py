"""What a backend is: it builds an engine from a graph (loader) and runs it (runner)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.graphset import PAD

Array = npt.NDArray[Any]
Log = Callable[[str], None]

PAST, PRESENT = "past", "present"
"""How the names of a cache's inputs begin, and those of the outputs that go on from them."""


@dataclass(frozen=True)
class Range:
    """Smallest, typical and largest size of a dynamic dimension."""

    min: int
    opt: int
    max: int


Axis = Range | int
"""A dynamic axis, or its fixed size."""


@dataclass(frozen=True)
class ShapeProfile:
    """One optimization profile: input name → a `Range` or fixed size per axis. Fixed inputs need no entry."""

    name: str
    inputs: Mapping[str, Sequence[Axis]]


@dataclass(frozen=True)
class EngineRecord:
    """One built engine. `roles`: what it serves; `file`: relative to the output folder."""

    roles: tuple[str, ...]
    file: str
    sha256: str
    bytes: int
    build_s: float
    peak_rss_mib: float
    backend: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One step of an engine: what the runtime made of a node, or of several.

    kind: the operator, in the runtime's words. scopes: where the graph's nodes that it computes stand, first ones first: modules,
    reductions. output: "Half [1, 64, 576]". tactic: what computes it. ms: a round; None where it is not known.
    """

    name: str
    kind: str
    scopes: tuple[str, ...]
    output: str
    tactic: str
    ms: float | None = None


class Runner(ABC):
    """Runs one engine. A context manager: nothing is loaded before `__enter__`.

    Values are numpy arrays or the runner's own device values; `run` takes both and returns device values, so that a KV
    cache goes from one step to the next without a host copy. `numpy` brings a value to the host.
    """

    def __enter__(self) -> Runner:
        """Load the engine, if there is anything to load."""
        return self

    def __exit__(  # noqa: B027 - nothing to release, unless a runner loaded something
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    @abstractmethod
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        """Input names and dtypes, in order."""

    @property
    @abstractmethod
    def outputs(self) -> Sequence[str]: ...

    @abstractmethod
    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run once. Feeds that are no input of the engine are an error."""

    def grow(
        self, feeds: Mapping[str, Any], past: Mapping[str, Any], tokens: int
    ) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Run a language model behind what is cached, and append to it.

        Args:
            feeds: inputs that are not the cache.
            past: the cache's, by name: what this returned last, or other values of any kind. A runner may append in memory of
                what it returned: to whom holds that, it stays what it was.
            tokens: how many new ones every row gets, padding counted.
        Returns:
            The other outputs, and `past` of the next run. Its values may be made when they are asked for: handed on as a whole,
            a cache need not cost anything per layer.
        """
        found = self.run({**feeds, **past})
        grown = {PAST + name[len(PRESENT) :]: found.pop(name) for name in list(found) if name.startswith(PRESENT)}
        return found, grown

    def steps(self, feeds: Mapping[str, Array], words: Array, past: Mapping[str, Any]) -> Steps:
        """Many runs of one token per row, see `Steps`. A runner may have ways of its own."""
        return Steps(self, feeds, words, past)

    @abstractmethod
    def numpy(self, value: Any) -> Array:
        """Bring a value to the host."""

    @property
    def in_words(self) -> str:
        """What runs, and on what: "ONNX Runtime, CPU"."""
        return type(self).__name__

    @property
    def batch(self) -> int | None:
        """Most samples at once, along the first axis of the first input; None: any number."""
        return None

    def layers(self, rounds: int = 1) -> Sequence[Layer]:
        """What the engine became; none where the runtime does not tell.

        Args:
            rounds: equal rounds that it has run, to which times are related if it was opened to be profiled. The first one, which
                allocates, counts only if there is no other.
        """
        return ()

    def chunk(self, cached: bool) -> int | None:
        """Most tokens that a language model runs at once here, be it a limit or what is fastest; None: any number.

        cached: behind a cache, or from the beginning of a prompt.
        """
        return None

    def gather(self, value: Any, rows: npt.NDArray[np.int64]) -> Any:
        """Rows of a value along its first axis, in any order and each as often as named, to be fed again. rows: [n]"""
        return self.numpy(value)[rows]

    def rows(self, past: Mapping[str, Any], rows: npt.NDArray[np.int64]) -> Mapping[str, Any]:
        """Rows of a cache, see `grow` and `gather`: one of its own."""
        return {name: self.gather(value, rows) for name, value in past.items()}


class Steps:
    """Runs a language model again and again with one token per row, each standing one behind that of the run before.

    Between two runs of a small model Python is the larger part of what is not the graph, so this is the path of a step, and short.

    Args:
        feeds: of the first run, as `Runner.grow` takes them; what `inputs_embeds` [rows, 1, width] hold is only kept behind `hidden`.
            They are written to.
        words: a row for every token [vocab, hidden].
        past: as `Runner.grow` takes it.
    """

    def __init__(self, runner: Runner, feeds: Mapping[str, Array], words: Array, past: Mapping[str, Any]) -> None:
        self._runner, self._feeds, self._words, self._past = runner, feeds, words, past
        self._embeds = self._rows(feeds["inputs_embeds"])
        self._moves = (feeds["order"] != PAD).astype(np.int64)
        self.found: Mapping[str, Any] = {}
        """What the last run returned beside logits and cache."""

    @property
    def past(self) -> Mapping[str, Any]:
        """The cache behind the last run."""
        return self._past

    def __call__(self, tokens: Sequence[int]) -> Array:
        """Logits float32 [rows, vocab] behind the next token of every row. The next run may write over them."""
        feeds = self._feeds
        for embeds, token in zip(self._embeds, tokens, strict=True):
            embeds[...] = self._words[token]
        self.found, self._past = found, _ = self._runner.grow(feeds, self._past, 1)
        self._move(self._moves)
        logits: Array = self._runner.numpy(found.pop("logits")).astype(np.float32, copy=False)
        return logits

    def _rows(self, embeds: Array) -> list[Array]:
        """Where each row's token goes in [rows, 1, width]."""
        return [row[0, : self._words.shape[1]] for row in embeds]

    def _move(self, by: npt.NDArray[np.int64]) -> None:
        """by: int64 [rows, 1], 0 where a row is padding."""
        for name in ("position_ids", "order", "reach"):
            if name in self._feeds:
                self._feeds[name][...] += by


class Backend(ABC):
    """Builds and opens engines. Constructing one imports nothing heavy."""

    name: str
    runs_graphs: bool = False
    """Whether its engine is the graph itself."""

    @abstractmethod
    def missing(self) -> str | None:
        """None, or what this machine lacks to *build*, with the command that brings it."""

    @abstractmethod
    def missing_to_run(self) -> str | None:
        """None, or what this machine lacks to *run* what was built."""

    def holds(self, cache: Sequence[int]) -> int:
        """Bytes that the caches of a conversation take while it is continued. Twice: a step reads one and writes the next.

        Args:
            cache: bytes of every tensor, at its longest.
        """
        return 2 * sum(cache)

    @abstractmethod
    def build(
        self, graph: Path, roles: tuple[str, ...], profiles: Sequence[ShapeProfile], out: Path,
        options: Mapping[str, Any], log: Log,
    ) -> EngineRecord:  # fmt: skip
        """Build one engine from an ONNX file into folder `out`. Raises ExportError with the parser's own words."""

    @abstractmethod
    def runner(
        self, engine: Path, threads: int | None = None, repeats: bool = False, graph: Path | None = None,
        profiled: bool = False,
    ) -> Runner:  # fmt: skip
        """A runner for a built engine.

        Args:
            graph: what it was built from, which has the weights of an engine built without them.
            repeats: whether it will run again and again without a pause, as the decode graph does.
            profiled: whether its layers are to be timed, where the runtime can; all of it is slower then.
        Raises:
            EnvironmentMismatch: it cannot run here.
        """
