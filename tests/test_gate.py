"""The latency gate's two error rates, by simulation: on noise made up to be nasty, and on noise that was recorded.

Every scenario runs the gate a thousand times on bundles that are equal, and as often on one that is 5 % slower than the other,
with the sessions, the stopping rule and the verdicts of `exporter.stages.check`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exporter import gate

LIMIT = 0.025
SLOWER = 1.05
RUNS, MOST, ROUNDS, STAGES = 1000, 20, 16, 5
RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "noise-int4-2026-11-21-x86_64-2cores.json"

Noise = Callable[[np.random.Generator], np.ndarray]
"""Time of every measurement in the order they are made: [runs, sessions, rounds, 2]."""

SHAPE = (RUNS, MOST, ROUNDS, 2)


def in_turn(values: np.ndarray) -> np.ndarray:
    """[..., rounds, place] ↔ [..., rounds, bundle]: who is first alternates. Its own inverse."""
    turned = values.copy()
    turned[..., 1::2, :] = values[..., 1::2, ::-1]
    return turned


def usual(rng: np.random.Generator, rounds: float = 0.03, openings: float = 0.01) -> np.ndarray:
    """From one measurement to the next, and from one opening of a bundle to the next, which rounds do not average."""
    opened = np.exp(rng.normal(0, openings, (RUNS, MOST, 1, 2))) * np.ones(SHAPE)
    return np.exp(rng.normal(0, rounds, SHAPE)) * in_turn(opened)


def loud(rng: np.random.Generator) -> np.ndarray:
    return usual(rng, rounds=0.3, openings=0.04)


def autoregressive(rng: np.random.Generator) -> np.ndarray:
    """AR(1), each measurement 0.9 of the one before, 5 % wide."""
    shocks = rng.normal(0, 0.05 * np.sqrt(1 - 0.9**2), (RUNS, MOST * ROUNDS * 2))
    state = rng.normal(0, 0.05, RUNS)
    for i in range(shocks.shape[1]):
        state = shocks[:, i] = 0.9 * state + shocks[:, i]
    return np.exp(shocks.reshape(SHAPE))


def warming(rng: np.random.Generator) -> np.ndarray:
    """The device warms up: 25 % slower in the end, most of it in the first fifth, of the check or of each session."""
    size = MOST * ROUNDS * 2
    whole = 1 + 0.25 * (1 - np.exp(-np.arange(size) / (size / 5)))
    part = 1 + 0.25 * (1 - np.exp(-np.arange(ROUNDS * 2) / 6))
    every = rng.random((RUNS, 1, 1, 1)) < 0.5
    return np.where(every, part.reshape(ROUNDS, 2), whole.reshape(SHAPE[1:]))


def outliers(rng: np.random.Generator) -> np.ndarray:
    """One measurement in fifteen takes 1.2 to 4 times as long."""
    return np.where(rng.random(SHAPE) < 1 / 15, rng.uniform(1.2, 4, SHAPE), 1)


def throttling(rng: np.random.Generator) -> np.ndarray:
    """Clocks fall by a third at any moment, and come back at any moment."""
    flips = rng.random((RUNS, MOST * ROUNDS * 2)) < 1 / 40
    return np.where(np.cumsum(flips, 1) % 2 == 1, 1.5, 1).reshape(SHAPE)


def first_pays(rng: np.random.Generator) -> np.ndarray:
    """Whoever is first in a round is 10 % slower."""
    return np.array([1.1, 1.0]) * np.ones(SHAPE)


DISTURBANCES = (autoregressive, warming, outliers, throttling, first_pays)


def everything(rng: np.random.Generator) -> np.ndarray:
    return np.prod([noise(rng) for noise in DISTURBANCES], axis=0)


def recorded(rng: np.random.Generator) -> np.ndarray:
    """Time to first token of identical bundles on a busy virtual machine, session by session, roles drawn."""
    entry = json.loads(RECORD.read_text())
    found = np.array([[s["a"]["ttft"], s["b"]["ttft"]] for s in entry["paired"]])  # [sessions, bundle, rounds]
    drawn = found[rng.integers(0, len(found), (RUNS, MOST))]
    swapped = rng.random((RUNS, MOST, 1, 1)) < 0.5
    return in_turn(np.where(swapped, drawn[..., ::-1, :], drawn).swapaxes(-1, -2))


def verdicts(times: np.ndarray, slowdown: float) -> tuple[Counter[str], float]:
    """How often each verdict came, and how many sessions it took. times: [runs, sessions, rounds, place]."""
    bundles = in_turn(times)
    found: Counter[str] = Counter()
    sessions = 0
    for run in gate.ratio(bundles[..., 0], bundles[..., 1] * slowdown):
        for count in range(gate.FEWEST, MOST + 1):
            finding = gate.paired(run[:count], LIMIT, STAGES)
            if gate.narrow(finding, LIMIT):
                break
        found[finding.verdict] += 1
        sessions += count
    return found, sessions / RUNS


def test_the_usual_noise_and_recorded_noise() -> None:
    for noise in (usual, recorded):
        same, _ = verdicts(noise(np.random.default_rng(1)), 1.0)
        worse, _ = verdicts(noise(np.random.default_rng(2)), SLOWER)
        assert same["slower"] < 0.01 * RUNS and worse["not slower"] < 0.01 * RUNS
        assert worse["slower"] > 0.95 * RUNS and same["not slower"] > 0.95 * RUNS


@pytest.mark.parametrize("disturbance", [*DISTURBANCES, everything])
def test_disturbances(disturbance: Noise) -> None:
    rng = np.random.default_rng(3)
    same, _ = verdicts(usual(rng) * disturbance(rng), 1.0)
    worse, _ = verdicts(usual(rng) * disturbance(rng), SLOWER)
    assert same["slower"] < 0.01 * RUNS and worse["not slower"] < 0.01 * RUNS
    assert worse["slower"] > 0.95 * RUNS


def test_too_much_noise_is_no_verdict() -> None:
    """Twenty sessions that differ by 10 % tell nothing of 5 %, and the gate says so."""
    rng = np.random.default_rng(4)
    for slowdown, wrong in ((1.0, "slower"), (SLOWER, "not slower")):
        found, sessions = verdicts(loud(rng), slowdown)
        assert found["cannot tell"] > 0.9 * RUNS and found[wrong] < 0.01 * RUNS and sessions > MOST - 1


def test_quantiles_of_students_t() -> None:
    """Abramowitz & Stegun, table 26.10."""
    table = {
        (0.95, 1): 6.314,
        (0.99, 2): 6.965,
        (0.99, 4): 3.747,
        (0.995, 9): 3.250,
        (0.975, 30): 2.042,
        (0.9995, 120): 3.373,
    }
    for (probability, freedom), value in table.items():
        assert gate.student(probability, freedom) == pytest.approx(value, abs=6e-4)


def test_what_would_settle_it() -> None:
    """Half of the interval with n sessions is t(n − 1) · s / √n; the first n where it is at most log 1.025."""
    rng = np.random.default_rng(5)
    ratios = rng.normal(0, 1, 6)
    ratios = (ratios - ratios.mean()) / ratios.std(ddof=1) * 0.03
    found = gate.paired(ratios, LIMIT, STAGES)
    assert found.verdict == "cannot tell" and found.needed is not None
    halves = [gate.student(1 - 0.001, n - 1) * 0.03 / n**0.5 for n in (found.needed - 1, found.needed)]
    assert halves[1] <= np.log(1.025) < halves[0]
    assert gate.paired(100 * ratios, LIMIT).needed is None


def starts(rng: np.random.Generator, count: int, spread: float) -> np.ndarray:
    """Levels of starts: [runs, count]. Five openings each, one in twenty of which is half as slow again."""
    openings = rng.normal(0, spread, (RUNS, count, 1)) + rng.normal(0, spread / 2, (RUNS, count, 5))
    openings += np.where(rng.random(openings.shape) < 0.05, np.log(1.5), 0)
    return gate.level(10 * np.exp(openings))


@pytest.mark.parametrize(("count", "spread"), [(6, 0.002), (10, 0.004), (30, 0.006)])
def test_stored_sessions(count: int, spread: float) -> None:
    """As many as docs/gate.md asks for."""
    rng = np.random.default_rng(6)
    stored, now = starts(rng, count, spread), starts(rng, 1, spread)
    for slowdown, right, wrong in ((1.0, "not slower", "slower"), (SLOWER, "slower", "not slower")):
        both = zip(stored, now + np.log(slowdown), strict=True)
        found = Counter(gate.unpaired(levels, level, LIMIT, STAGES).verdict for levels, level in both)
        assert found[right] > 0.95 * RUNS and found[wrong] < 0.01 * RUNS, found


def test_sessions_of_earlier_bundles() -> None:
    """Four, three and one of bundles that take 10, 12 and 9 ms; only the last is compared with, all tell how sessions differ."""
    rng = np.random.default_rng(7)
    first, second, last, now = (np.log(ms) + starts(rng, n, 0.003) for ms, n in ((10, 4), (12, 3), (9, 1), (9, 1)))
    for slowdown, wrong in ((1.0, "slower"), (SLOWER, "not slower")):
        found = Counter(
            gate.unpaired(last[i], now[i] + np.log(slowdown), LIMIT, STAGES, (first[i], second[i])).verdict
            for i in range(RUNS)
        )
        assert found[wrong] < 0.01 * RUNS and found["cannot tell"] < 0.5 * RUNS, found


def test_one_stored_session_tells_nothing() -> None:
    """However slow the candidate is: a start may be as slow as that."""
    found = gate.unpaired([0.0], [0.5], LIMIT)
    assert (found.verdict, found.needed) == ("cannot tell", 3)
    assert gate.unpaired([0.0, 0.001], [0.5], LIMIT).verdict == "cannot tell"
    assert gate.unpaired([0.0, 0.001, 0.002], [0.5], LIMIT).verdict == "slower"


def test_starts_that_were_recorded_differ_too_much() -> None:
    """8 % from start to start on that machine: no number of stored sessions tells 5 %, and pairs do."""
    entry = json.loads(RECORD.read_text())
    levels = [float(gate.level(s["ttft"])) for s in entry["starts"]]
    found = gate.unpaired(levels[:-1], levels[-1:], LIMIT)
    assert (found.verdict, found.needed) == ("cannot tell", None)
