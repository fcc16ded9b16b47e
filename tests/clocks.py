"""A clock that stands still until a test moves it on."""

from __future__ import annotations

import threading
import time

from engine.scheduler import Clock


class ManualClock(Clock):
    def __init__(self) -> None:
        self._now, self._base = 0.0, time.time_ns()
        self._waiters: set[threading.Condition] = set()
        self._guard = threading.Lock()

    def monotonic(self) -> float:
        return self._now

    def time_ns(self) -> int:
        return self._base + int(self._now * 1e9)

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        with self._guard:
            self._waiters.add(condition)
        condition.wait(0.5)  # real seconds, in case `advance` came between the look at the time and this

    def advance(self, seconds: float) -> None:
        self._now += seconds
        with self._guard:
            waiters = list(self._waiters)
        for condition in waiters:
            with condition:
                condition.notify_all()
