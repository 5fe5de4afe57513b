"""How often a search under a budget ends as an exhaustive one would, by how many places of a rung go to likely winners.

    python -m benchmarks.survivors --searches 300

Made-up models: methods differ in how much they lose and add, answers are drawn, and what is measured is up to 1.4 times the roofline.
Not a measurement of any model: it compares ways of choosing on equal terms.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import log2

import numpy as np
import numpy.typing as npt

from exporter.stages.validate import points_lost
from exporter.tune import halving
from exporter.tune.survivors import Standing, survivors

QUESTIONS, METHODS, FINALISTS, RATIOS = 300, 14, 4, (0.5, 0.25, 0.125)
POINTS, MILLISECONDS = 5.0, 55.0
"""The budgets: of points lost, or of measured time."""
Choose = Callable[[Sequence[Standing], float | None, int], list[int]]


@dataclass(frozen=True)
class Candidate:
    roofline_ms: float
    measured_ms: float
    memory_mib: float
    right: npt.NDArray[np.float64]
    """[questions], 0 or 1."""


def candidates(rng: np.random.Generator, full: npt.NDArray[np.float64]) -> list[Candidate]:
    found = []
    for _ in range(METHODS):
        loses, adds = rng.uniform(0.2, 2.5), rng.uniform(0, 0.15)
        for ratio in RATIOS:
            drop = loses * 6 * log2(1 / ratio) ** 1.6 * rng.uniform(0.6, 1.4) / 100
            kept = np.where(rng.random(len(full)) < drop, 0.0, full)
            right = np.where(rng.random(len(full)) < 0.02, 1.0, kept)
            ms = 20 + 80 * (ratio + adds)
            found.append(Candidate(ms, ms * rng.uniform(1.0, 1.4), 500 + 100 * ratio, right))
    return found


def winner(those: Sequence[Candidate], full: npt.NDArray[np.float64], most: float | None) -> Candidate | None:
    """With `most` points the fastest, else the best within the time."""

    def lost(c: Candidate) -> float:
        return points_lost(full.tolist(), c.right.tolist())[0]

    if most is not None:
        return min((c for c in those if lost(c) <= most), key=lambda c: c.measured_ms, default=None)
    return min(
        (c for c in those if c.measured_ms <= MILLISECONDS), key=lambda c: (lost(c), c.measured_ms), default=None
    )


def search(
    those: Sequence[Candidate], full: npt.NDArray[np.float64], most: float | None, choose: Choose
) -> list[Candidate]:
    """Those that are exported."""
    left = [c for c in those if most is not None or c.roofline_ms <= MILLISECONDS]
    for rung in halving.schedule(len(left), len(full), FINALISTS):
        lost = [points_lost(full[: rung.questions].tolist(), c.right[: rung.questions].tolist()) for c in left]
        able = [i for i, (drop, error) in enumerate(lost) if most is None or drop - error <= most]
        known = [Standing(left[i].roofline_ms, left[i].memory_mib, lost[i][0]) for i in able]
        left = [left[able[k]] for k in choose(known, most, rung.survive)]
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for words, most in (("points", POINTS), ("time", None)):
        rng = np.random.default_rng(given.seed)
        same = dict.fromkeys((0.0, 0.5, 0.75, 1.0), 0)
        none, made = dict.fromkeys(same, 0), 0
        for _ in range(given.searches):
            full = (rng.random(QUESTIONS) < 0.95).astype(float)
            those = candidates(rng, full)
            best = winner(those, full, most)
            if best is None:
                continue
            made += 1
            for share in same:
                found = winner(search(those, full, most, partial(survivors, share=share)), full, most)
                same[share] += found is best
                none[share] += found is None
        for share in same:
            print(f"budget of {words}, {share:.0%} to likely winners: {same[share] / made:.1%} end as an exhaustive search, "
                  f"{none[share] / made:.1%} without a winner ({made} searches)")  # fmt: skip


if __name__ == "__main__":
    main()
