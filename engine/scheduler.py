"""Work that is due at some time, for any number of things, on few threads. Floor 2.

One thread waits for what is due next; a bounded pool, made as needed, carries it out. All methods from any thread; they
take one lock for a moment and wait for nothing. A clock can be put in, for tests.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)


class Clock:
    """The time of this host."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time_ns(self) -> int:
        return time.time_ns()

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        """Until notified, or for `seconds` of this clock."""
        condition.wait(seconds)


class Scheduler:
    def __init__(self, name: str, workers: int, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self._name, self._most = name, workers
        lock = threading.RLock()  # guards all below
        self._condition = threading.Condition(lock)  # for the thread that waits
        self._ready = threading.Condition(lock)  # for the pool
        self._heap: list[tuple[float, int, str]] = []
        self._due: dict[str, tuple[int, Callable[[], None]]] = {}
        self._numbers = itertools.count()
        self._queue: deque[Callable[[], None]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def after(self, key: str, seconds: float, work: Callable[[], None]) -> None:
        """Do `work` in `seconds`, in place of what was due under the same key. Ignored once closed."""
        with self._condition:
            if self._closed:
                return
            number = next(self._numbers)
            self._due[key] = (number, work)
            heapq.heappush(self._heap, (self.clock.monotonic() + max(0.0, seconds), number, key))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def cancel(self, key: str) -> None:
        """Forget what is due under `key`; what has begun goes on."""
        with self._condition:
            self._due.pop(key, None)

    def close(self, seconds: float = 0.5) -> None:
        """Begin nothing more; wait up to `seconds` altogether for what has begun."""
        with self._condition:
            self._closed = True
            self._due.clear()
            self._queue.clear()
            self._condition.notify_all()
            self._ready.notify_all()
            threads = list(self._threads)
        until = time.monotonic() + seconds
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        with self._condition:
            while not self._closed:
                now = self.clock.monotonic()
                while self._heap and self._heap[0][0] <= now:
                    _, number, key = heapq.heappop(self._heap)
                    known = self._due.get(key)
                    if known is not None and known[0] == number:
                        del self._due[key]
                        self._hand_over(known[1])
                self.clock.wait(self._condition, self._heap[0][0] - now if self._heap else None)

    def _hand_over(self, work: Callable[[], None]) -> None:
        self._queue.append(work)
        if self._idle < len(self._queue) and len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._ready.notify()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._idle += 1
                while not self._queue and not self._closed:
                    self._ready.wait()
                self._idle -= 1
                if self._closed:
                    return
                work = self._queue.popleft()
            try:
                work()
            except Exception:
                log.exception("%s: what was due failed", self._name)
