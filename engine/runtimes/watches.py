"""Waits for the ends of the monitors of all containers of a driver, on one thread. Floor 2.

Only here: that each end is told once, and by the watch that was asked for last. Thread-safe.
"""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
from collections.abc import Callable

from engine.errors import Busy
from engine.runtimes import pids
from engine.runtimes.base import Exit

log = logging.getLogger(__name__)

UNKNOWN = 255  # exit code when nobody saw it


class Watches:
    def __init__(self, finish: Callable[[str], Exit]) -> None:
        """`finish` is asked, on the thread that waits, what became of a container whose monitor has ended."""
        self._finish = finish
        self._lock = threading.Lock()  # guards the fields below; never held over a wait
        self._watched: dict[str, tuple[int, Callable[[str, Exit], None]]] = {}  # id -> pidfd or -1, callback
        self._selector: selectors.BaseSelector | None = None
        self._wake = pids.Waker()
        self._closed = False

    def watch(self, id: str, pidfd: int, on_exit: Callable[[str, Exit], None]) -> None:
        """Call `on_exit` once, when the process of `pidfd`, which is closed here, has ended; -1: it has already. In
        place of an earlier watch of `id`. Busy when closed."""
        with self._lock:
            if self._closed:
                if pidfd >= 0:
                    os.close(pidfd)
                raise Busy("the driver is closed")
            self._forget(id)
            self._watched[id] = (pidfd, on_exit)
            if self._selector is None:
                self._selector = selectors.DefaultSelector()
                self._selector.register(self._wake, selectors.EVENT_READ, None)
                thread = threading.Thread(target=self._wait, args=(self._selector,), name="oci-watch", daemon=True)
                thread.start()
            if pidfd >= 0:
                self._selector.register(pidfd, selectors.EVENT_READ, id)
            else:
                self._wake.wake()

    def forget(self, id: str) -> None:
        """Nobody wants to know any more. Idempotent."""
        with self._lock:
            self._forget(id)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._selector is not None:
                self._wake.wake()

    def _forget(self, id: str) -> None:
        """The lock is held."""
        pidfd, _ = self._watched.pop(id, (-1, None))
        if pidfd >= 0:
            if self._selector is not None:
                self._selector.unregister(pidfd)
            os.close(pidfd)

    def _wait(self, selector: selectors.BaseSelector) -> None:
        while True:
            ready = selector.select()
            due: list[tuple[str, Callable[[str, Exit], None]]] = []
            with self._lock:
                if self._closed:
                    for id in list(self._watched):
                        self._forget(id)
                    selector.close()
                    self._wake.close()
                    self._selector = None
                    return
                self._wake.clear()
                ids = {key.data for key, _ in ready if key.data is not None}
                ids |= {id for id, (pidfd, _) in self._watched.items() if pidfd < 0}
                for id in ids & self._watched.keys():
                    pidfd, callback = self._watched[id]
                    if pidfd >= 0 and not pids.ended(pidfd, 0):
                        continue  # an older event, of a watch that has been replaced since
                    due.append((id, callback))
                    self._forget(id)
            for id, callback in due:
                try:
                    end = self._finish(id)
                except Exception as error:
                    log.exception("how container %s ended was not found out", id)
                    end = Exit(UNKNOWN, False, time.time_ns(), f"how it ended was not found out: {error}")
                try:
                    callback(id, end)
                except Exception:
                    log.exception("reporting the end of container %s failed", id)
