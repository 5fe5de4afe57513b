"""How far a transfer is, by a clock that the test turns."""

from __future__ import annotations

from exporter.transfer import WINDOW_S, Transfer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_bytes_rate_and_time_left() -> None:
    said: list[str] = []
    clock = Clock()
    transfer = Transfer(100_000_000_000, "writing weights", said.append, clock)
    for seconds, count in ((0, 1e9), (2, 1e9), (2, 4e9)):
        clock.now += seconds
        transfer.advance(int(count))
    assert said == [
        "writing weights, 1.00 of 100.00 GB",
        "writing weights, 2.00 of 100.00 GB, 500 MB/s, 3:16 left",
        "writing weights, 6.00 of 100.00 GB, 1250 MB/s, 1:15 left",
    ]


def test_the_rate_forgets_what_is_long_ago() -> None:
    """Parts that are kept pass much faster than those that have to be written."""
    said: list[str] = []
    clock = Clock()
    transfer = Transfer(10_000_000_000, "x", said.append, clock)
    for _ in range(5):
        clock.now += 1
        transfer.advance(1_000_000_000)
    for _ in range(4):
        clock.now += WINDOW_S / 2
        transfer.advance(100_000_000)
    assert said[-1] == "x, 5.40 of 10.00 GB, 10 MB/s, 7:40 left"


def test_it_is_said_not_too_often_but_at_the_end() -> None:
    said: list[str] = []
    clock = Clock()
    transfer = Transfer(1000, "x", said.append, clock)
    for _ in range(1000):
        clock.now += 0.001
        transfer.advance(1)
    assert 10 <= len(said) <= 12
    assert said[-1].startswith("x, 0.00 of 0.00 GB, ")
    assert said[-1].endswith(" 0:00 left")
