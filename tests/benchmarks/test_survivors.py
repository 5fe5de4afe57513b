from __future__ import annotations

import numpy as np
import pytest

from benchmarks import survivors


def test_it_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["survivors", "--searches", "2"])
    survivors.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all("end as an exhaustive search" in line for line in lines)


def test_the_winner_is_within_the_budget() -> None:
    """By hand: two candidates, of which the faster one loses 10 points."""
    full = np.ones(100)
    good, bad = (
        survivors.Candidate(50, 60, 500, full),
        survivors.Candidate(30, 40, 500, np.r_[np.zeros(10), np.ones(90)]),
    )
    assert survivors.winner([good, bad], full, 5.0) is good
    assert survivors.winner([good, bad], full, 15.0) is bad
    assert survivors.winner([good, bad], full, None) is bad  # 60 ms is above the budget of time
    assert survivors.winner([good], full, None) is None
