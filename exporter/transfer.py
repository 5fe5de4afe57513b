"""How far a long transfer is, in words: bytes, rate, time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 20.0
"""Over how much of the past the rate is taken: long enough for a large tensor, short enough to see a disk slow down."""
EVERY_S = 0.1


class Transfer:
    """Counts bytes and says how far it is.

    Args:
        total: bytes. title: what is transferred. log: is told, at most every `EVERY_S` seconds and at the end.
    """

    def __init__(
        self, total: int, title: str, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._title, self._log, self._clock = total, title, log, clock
        self._done, self._said = 0, float("-inf")
        self._past: deque[tuple[float, int]] = deque()

    def advance(self, count: int) -> None:
        """So many bytes more are done."""
        now = self._clock()
        self._done += count
        self._past.append((now, self._done))
        while now - self._past[0][0] > WINDOW_S and len(self._past) > 2:
            self._past.popleft()
        if now - self._said >= EVERY_S or self._done >= self._total:
            self._said = now
            self._log(self._text(now))

    def _text(self, now: float) -> str:
        text = f"{self._title}, {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        begin, before = self._past[0]
        if now <= begin:
            return text
        rate = (self._done - before) / (now - begin)
        minutes, seconds = divmod(round(max(0, self._total - self._done) / rate), 60)
        return f"{text}, {rate / 1e6:.0f} MB/s, {minutes}:{seconds:02} left"
