"""Bounded queues between the threads of an ingest, and how they stop together.

Only here: the threads. A stage that fails breaks every pipe, so nobody waits for one that is gone; the first failure
is the one reported.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

FEED = 1 << 19  # bytes of compressed input handed on at once
FEED_SECONDS = 0.1  # what comes in small pieces is gathered no longer than this


class Broken(Exception):
    """Another stage failed; its error is what matters."""


class Pipe:
    """At most `depth` blocks between one writer and one reader."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: deque[bytes] = deque()
        self._change = threading.Condition(threading.Lock())
        self._closed = False
        self._broken = False

    def put(self, block: bytes) -> None:
        """Wait for room. Broken when the other side is gone."""
        with self._change:
            while len(self._items) >= self._depth and not self._broken:
                self._change.wait()
            if self._broken:
                raise Broken
            self._items.append(block)
            self._change.notify()

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify()

    def break_(self) -> None:
        with self._change:
            self._broken = True
            self._items.clear()
            self._change.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._change:
                while not self._items and not self._closed and not self._broken:
                    self._change.wait()
                if self._broken:
                    raise Broken
                if not self._items:
                    return
                block = self._items.popleft()
                self._change.notify()
            yield block


class Stages:
    """Threads that succeed or fail together. A context manager: leaving it joins them and raises the first failure."""

    def __init__(self, pipes: list[Pipe]) -> None:
        self._pipes = pipes
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def start(self, name: str, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.fail(error)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None and not isinstance(error, Broken):
                self._error = error
        for pipe in self._pipes:
            pipe.break_()

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is not None:
            self.fail(error)
        for thread in self._threads:
            thread.join()
        first, self._error = self._error, None  # not kept: its traceback holds the stages' buffers
        if first is not None and first is not error:
            raise first


def gathered(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks as pieces near FEED bytes: every hand-over between threads costs. What came before a failure of
    `chunks` is handed on first, so that a broken download is kept as far as it got."""
    held: list[bytes] = []
    size, since = 0, time.monotonic()
    source = iter(chunks)
    while True:
        try:
            chunk = next(source, None)
        except BaseException:
            if held:
                yield b"".join(held)
            raise
        if chunk is None:
            break
        if len(chunk) >= FEED:
            if held:
                yield b"".join(held)
            for at in range(0, len(chunk), FEED):
                yield chunk if len(chunk) == FEED else chunk[at : at + FEED]
            held, size, since = [], 0, time.monotonic()
            continue
        held.append(chunk)
        size += len(chunk)
        if size >= FEED or time.monotonic() - since > FEED_SECONDS:
            yield b"".join(held)
            held, size, since = [], 0, time.monotonic()
    if held:
        yield b"".join(held)
