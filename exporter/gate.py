"""Is it slower? The statistics of the latency gate: no files, no clock, numpy only.

The unit is the *session*. Rounds of one session share where memory lies, how warm the device is and who else runs on it, so
more of them say nothing about the next session; sessions are independent of one another (Kalibera & Jones 2013, "Rigorous
benchmarking in reasonable time"). A session gives one number, a logarithm, and Student's t over the sessions covers whatever
varies in and between them.

- *Paired*: a session opens both bundles and times them in turn; its number is the log ratio of their times, so that what slows
  the machine slows both. Sessions are added until the interval is narrow enough. When to stop depends on its width alone,
  never on where it lies.
- *Unpaired*: a session is a start of the program; its number is the log of its time. The sessions stored with a baseline tell
  how much sessions differ when nothing changed, which a single one cannot.

The limit is the slowdown that is allowed. The interval has to be as narrow as the limit on either side: then a bundle twice
the limit slower is found, and one that is no slower passes; in between the estimate decides.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Verdict = Literal["slower", "not slower", "cannot tell"]

ALPHA = 0.005
"""Probability that a bound is wrong, on either side, for all stages of a gate together. Half of what we promise (1 % false
alarms), as looking at the width after every session costs some."""
FEWEST = 5
"""Paired sessions before the width of an interval means anything."""
FEWEST_STORED = 3
"""Sessions of a baseline; fewer do not tell a slowdown from how sessions differ."""
MOST = 1000
"""Sessions that `needed` counts to."""


@dataclass(frozen=True)
class Finding:
    """What the sessions say of one stage.

    slowdown, low, high: 0.05 is 5 % slower, -0.05 takes 5 % less time; low and high are one-sided bounds. sessions: that were
    there (of the baseline, where unpaired). needed: as many would settle it, if they differ as those so far; None if no number
    does, or if it is settled.
    """

    slowdown: float
    low: float
    high: float
    verdict: Verdict
    sessions: int
    needed: int | None = None

    @property
    def settled(self) -> bool:
        return self.verdict != "cannot tell"


def ratio(baseline: npt.ArrayLike, candidate: npt.ArrayLike) -> Floats:
    """Log of how many times longer the candidate takes: [..., rounds] of both, in milliseconds → [...].

    Rounds are in the order they were measured, and who is first alternates: the median is taken of each order by itself, so
    that a drift, or a price of being first, cancels.
    """
    logs = np.log(np.asarray(candidate, np.float64)) - np.log(np.asarray(baseline, np.float64))
    if logs.shape[-1] == 1:
        return np.asarray(logs[..., 0])
    return np.asarray((np.median(logs[..., 0::2], axis=-1) + np.median(logs[..., 1::2], axis=-1)) / 2)


def level(rounds: npt.ArrayLike) -> Floats:
    """Log of what a session takes: [..., rounds] milliseconds → [...]."""
    return np.asarray(np.median(np.log(np.asarray(rounds, np.float64)), axis=-1))


def paired(ratios: npt.ArrayLike, limit: float, stages: int = 1) -> Finding:
    """Judge paired sessions.

    Args:
        ratios: [sessions], of `ratio`. limit: slowdown that is allowed, 0.025 for 2.5 %.
        stages: that are judged together; the probability of a wrong bound is shared among them.
    """
    found = np.asarray(ratios, np.float64)
    count, allowed, alpha = len(found), math.log1p(limit), ALPHA / stages
    if count < 2:
        return _unknown(float(found.mean()), count, FEWEST)
    spread = float(found.std(ddof=1))

    def half(n: int) -> float:
        return student(1 - alpha, n - 1) * spread / math.sqrt(n)

    return _judge(float(found.mean()), half, count, FEWEST, allowed)


def unpaired(
    baseline: npt.ArrayLike,
    candidate: npt.ArrayLike,
    limit: float,
    stages: int = 1,
    earlier: Sequence[npt.ArrayLike] = (),
) -> Finding:
    """Judge sessions of a candidate against those stored with a baseline.

    Args:
        baseline: [sessions], of `level`. candidate: [sessions] likewise, usually one; taken to differ as the baseline's do.
        limit, stages: see `paired`.
        earlier: sessions of other bundles under the same conditions, one array each: how much those of one bundle differ says how
            much sessions do.
    """
    stored, now = np.asarray(baseline, np.float64), np.asarray(candidate, np.float64)
    groups = [stored, now, *(np.asarray(levels, np.float64) for levels in earlier)]
    squares = sum(float(((levels - levels.mean()) ** 2).sum()) for levels in groups)
    count, freedom = len(stored), sum(len(levels) - 1 for levels in groups)
    change = float(now.mean() - stored.mean())
    if freedom < FEWEST_STORED - 1:
        return _unknown(change, count, count + FEWEST_STORED - 1 - freedom)
    spread, allowed, alpha = math.sqrt(squares / freedom), math.log1p(limit), ALPHA / stages

    def half(n: int) -> float:
        return student(1 - alpha, freedom + n - count) * spread * math.sqrt(1 / n + 1 / len(now))

    return _judge(change, half, count, 1, allowed)


def narrow(finding: Finding, limit: float) -> bool:
    """Whether the interval is as narrow as a verdict needs: what decides that no further session is measured."""
    return finding.sessions >= FEWEST and math.log1p(finding.high) - math.log1p(finding.slowdown) <= math.log1p(limit)


def _judge(change: float, half: Callable[[int], float], count: int, fewest: int, allowed: float) -> Finding:
    """`half(n)`: half of the interval's width with n sessions."""
    low, high = change - half(count), change + half(count)
    verdict: Verdict = "cannot tell"
    if count >= fewest and low > 0 and change > allowed:
        verdict = "slower"
    elif count >= fewest and high < 2 * allowed and change <= allowed:
        verdict = "not slower"
    needed = None
    if verdict == "cannot tell" and half(MOST) <= allowed:
        counts = range(max(count + 1, fewest), MOST + 1)
        needed = counts[bisect_left(counts, True, key=lambda n: half(n) <= allowed)]
    return Finding(math.expm1(change), math.expm1(low), _expm1(high), verdict, count, needed)


def _unknown(change: float, count: int, needed: int) -> Finding:
    return Finding(math.expm1(change), -1.0, math.inf, "cannot tell", count, needed)


def _expm1(x: float) -> float:
    return math.expm1(x) if x < 700 else math.inf


@cache
def student(probability: float, freedom: int) -> float:
    """Quantile of Student's t, at least 0.5: the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4, inverted by bisection."""
    low, high = 0.0, 1.0
    while _central(high, freedom) < 2 * probability - 1:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, freedom) < 2 * probability - 1 else (low, middle)
    return high


def _central(t: float, freedom: int) -> float:
    """Probability of -t..t."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
