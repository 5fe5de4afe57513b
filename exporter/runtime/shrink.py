"""The cache of a model whose reduction goes on while decoding: cut again when an answer has got so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.backends._contract import PAST, PRESENT, Runner
from exporter.graphset import GraphSet, bucket_role
from exporter.runtime.sequence import Ints

Hand = Callable[[Any, Runner, Runner], Any]
"""(value, runner that gave it, runner that takes it) → the value as the second one takes it."""


@dataclass
class Shrunk:
    """How far a conversation's cache has shrunk."""

    row: Any
    """`attention_row` of the newest token, and `kept`, the places in it that are still there: device values."""
    kept: Any
    wanted: Ints | None
    """[batch]: visual tokens that a trained predictor asks for next."""
    answered: int = 0
    """Tokens run since prefill."""
    cuts: list[tuple[int, int]] = field(default_factory=list)
    """(tokens run, visual tokens left) of every cut so far."""


class Shrinking:
    """Cuts caches by the graphs of `graphs.buckets`: at their steps or, if the graphs predict, as soon as every row of the
    batch wants no more than a bucket holds.

    Args:
        runners: role → opened runner. hand: see `Hand`.
    """

    def __init__(self, runners: Mapping[str, Runner], graphs: GraphSet, hand: Hand) -> None:
        self._decode, self._hand, self._graphs = runners["decode"], hand, graphs
        self._runners = [runners[bucket_role(n)] for n in range(len(graphs.buckets))]

    def begin(self, found: Mapping[str, Any], runner: Runner) -> Shrunk:
        """From what prefill returned."""
        kept = max((n for n in found if n.startswith("kept_")), key=lambda n: int(n.removeprefix("kept_")))
        shrunk = Shrunk(None, self._hand(found[kept], runner, self._decode), None)
        self._look(shrunk, found, runner)
        return shrunk

    def ran(self, shrunk: Shrunk, found: Mapping[str, Any]) -> None:
        """Note what a run of the decode graph returned."""
        self._look(shrunk, found, self._decode)
        shrunk.answered += 1

    def cut(self, shrunk: Shrunk, past: Mapping[str, Any], active: npt.NDArray[np.bool_] | None) -> Mapping[str, Any]:
        """`past`, cut if it is time to. active: [batch], rows that have not ended; None is all."""
        for runner, (step, keep) in list(zip(self._runners, self._graphs.buckets, strict=True))[len(shrunk.cuts) :]:
            if shrunk.wanted is None:
                due = shrunk.answered >= step
            else:
                due = bool((shrunk.wanted[slice(None) if active is None else active] <= keep).all())
            if not due:
                break
            feeds = {"attention_row": shrunk.row, "kept": shrunk.kept, **past}
            found = runner.run({n: self._hand(feeds[n], self._decode, runner) for n in runner.inputs})
            shrunk.kept = self._hand(found.pop("kept_now"), runner, self._decode)
            cut = {PAST + n[len(PRESENT) :]: self._hand(value, runner, self._decode) for n, value in found.items()}
            past = {**past, **cut}
            shrunk.cuts.append((shrunk.answered, keep))
        return past

    def _look(self, shrunk: Shrunk, found: Mapping[str, Any], runner: Runner) -> None:
        shrunk.row = self._hand(found["attention_row"], runner, self._decode)
        if "wanted" in found:
            shrunk.wanted = runner.numpy(found["wanted"])
