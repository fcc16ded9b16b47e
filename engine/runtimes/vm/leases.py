"""Paused machines go on while somebody looks at their files. Floor 2.

Only here: for how long. Who asks a paused machine's agent finds it awake (Pausing.awake: its processes stay frozen),
and it sleeps on LINGER seconds after the last call, since calls come in bursts. Thread-safe.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

from engine.errors import Busy, EngineError

log = logging.getLogger(__name__)

LINGER = 1.0


@dataclass
class _Lease:
    lock: threading.Lock = field(default_factory=threading.Lock)  # of all below; held while it wakes up or sleeps
    held: ExitStack | None = None  # while it is awake
    calls: int = 0  # under way
    last: float = 0.0  # when one ended
    thread: threading.Thread | None = None  # that lets it sleep on
    over: bool = False  # the next call has another
    failure: EngineError | None = None  # why it was not woken: who waited meanwhile need not find out again


class Leases:
    """By container. `awake` is Pausing.awake of its machine."""

    def __init__(self, linger: float = LINGER) -> None:
        self._linger = linger
        self._lock = threading.Lock()  # never held over I/O
        self._leases: dict[str, _Lease] = {}
        self._closing = threading.Event()

    @contextmanager
    def of(self, id: str, awake: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """In the block its agent answers. Busy when its processes are not frozen; RuntimeFailure when QEMU does not let
        it go on."""
        while True:
            with self._lock:
                lease = self._leases.setdefault(id, _Lease())
            with lease.lock:
                if lease.failure is not None:
                    raise lease.failure
                if lease.over:
                    continue
                if lease.held is None:
                    self._wake(id, lease, awake)
                lease.calls += 1
            break
        try:
            yield
        finally:
            with lease.lock:
                lease.calls -= 1
                lease.last = time.monotonic()

    def _wake(self, id: str, lease: _Lease, awake: Callable[[], AbstractContextManager[None]]) -> None:
        """Its lock is held."""
        try:
            with ExitStack() as stack:
                stack.enter_context(awake())
                lease.held = stack.pop_all()
        except EngineError as error:
            lease.failure = error
            raise
        finally:
            if lease.held is None:
                self._end(id, lease)
        lease.thread = threading.Thread(target=self._let_sleep, args=(id, lease), name="awake", daemon=True)
        lease.thread.start()

    def _end(self, id: str, lease: _Lease) -> None:
        """Its lock is held."""
        lease.over = True
        with self._lock:
            del self._leases[id]

    def _let_sleep(self, id: str, lease: _Lease) -> None:
        rest = self._linger
        while True:
            closing = self._closing.wait(rest)
            with lease.lock:
                rest = self._linger if lease.calls else lease.last + self._linger - time.monotonic()
                if rest > 0 and not closing:
                    continue
                assert lease.held is not None
                try:
                    lease.held.close()
                except Busy as error:  # somebody resumed it meanwhile: nothing is left to do
                    log.debug("container %s: %s", id[:12], error)
                finally:
                    self._end(id, lease)
            return

    def close(self) -> None:
        """All sleep on, calls under way or not."""
        self._closing.set()
        with self._lock:
            threads = [lease.thread for lease in self._leases.values() if lease.thread is not None]
        for thread in threads:
            thread.join()
