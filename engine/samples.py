"""The last minutes of what containers used, in memory. Floor 3.

Only here: the ring of samples behind `stats.svg`. The monitor's thread adds to it, any thread reads. Bounded: SPAN
seconds of a container, and nothing of one that stopped longer ago than that.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import NamedTuple

EVERY = 2.0  # seconds between two samples
SPAN = 600.0  # seconds that are kept
GAP = 4 * EVERY  # seconds without a sample after which the line breaks: it did not run, or nobody looked


class Sample(NamedTuple):
    at: float  # seconds, monotonic
    cpu_percent: float  # of one CPU, since the sample before
    memory_bytes: int


class Samples:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rings: dict[str, deque[Sample]] = {}
        self._last: dict[str, tuple[float, int]] = {}  # when, and CPU time used by then in µs

    def due(self, id: str, now: float) -> bool:
        with self._lock:
            last = self._last.get(id)
        return last is None or now - last[0] >= EVERY

    def add(self, id: str, now: float, cpu_usec: int, memory_bytes: int) -> None:
        """One look at the counters; a sample is what lies between two of them."""
        with self._lock:
            last, self._last[id] = self._last.get(id), (now, cpu_usec)
            if last is None or not 0 < now - last[0] <= GAP or cpu_usec < last[1]:
                return  # the first of a run
            percent = (cpu_usec - last[1]) / (now - last[0]) / 1e4
            ring = self._rings.setdefault(id, deque(maxlen=round(SPAN / EVERY)))
            ring.append(Sample(now, percent, memory_bytes))
            if len(self._last) > 1:
                self._forget_old(now)

    def _forget_old(self, now: float) -> None:
        for id in [id for id, (when, _) in self._last.items() if now - when > SPAN]:
            self._last.pop(id)
            self._rings.pop(id, None)

    def get(self, id: str) -> list[Sample]:
        """Oldest first, none older than SPAN."""
        oldest = time.monotonic() - SPAN
        with self._lock:
            return [sample for sample in self._rings.get(id, ()) if sample.at >= oldest]

    def forget(self, id: str) -> None:
        with self._lock:
            self._rings.pop(id, None)
            self._last.pop(id, None)
