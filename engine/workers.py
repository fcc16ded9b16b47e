"""Work that goes on beside its caller. Floor 2.

Only here: how long a write to a ctl may wait for what it began, and where an error goes when nobody waits any more.
Thread-safe.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from engine.errors import EngineError, RuntimeFailure
from engine.events import acting, acting_as
from engine.failures import Failures

log = logging.getLogger(__name__)


class Workers:
    def __init__(self, failures: Failures) -> None:
        self._failures = failures
        self._guard = threading.Lock()
        self._threads: set[threading.Thread] = set()

    def bounded(self, object: str, command: str, patience: float, work: Callable[[], None]) -> None:
        """Do `work` on a thread and wait for it up to `patience` seconds; then it goes on by itself.

        Its error is raised here, or, once the caller has left, recorded as a failure of `object`.
        """
        done = threading.Event()
        hand_over = threading.Lock()
        outcome: list[BaseException] = []
        left = False
        who = acting_as()

        def body() -> None:
            try:
                with acting(who):
                    work()
            except BaseException as error:
                with hand_over:
                    outcome.append(error)
                    late = left
                if not isinstance(error, EngineError | OSError):
                    log.exception("%s of %s failed", command, object)
                if late:
                    self._late(object, command, error)
            finally:
                done.set()
                with self._guard:
                    self._threads.discard(threading.current_thread())

        name = f"{command}-{object.rpartition('/')[2][:12]}"
        thread = threading.Thread(target=body, name=name, daemon=True)
        with self._guard:
            self._threads.add(thread)
        thread.start()
        done.wait(patience)
        with hand_over:
            left = True
            if outcome:
                raise outcome[0]

    def _late(self, object: str, command: str, error: BaseException) -> None:
        log.warning("%s of %s failed: %s", command, object, error)
        if not isinstance(error, EngineError):
            error = RuntimeFailure(f"{type(error).__name__}: {error}")
        self._failures.record(object, command, error)

    def join(self, seconds: float) -> None:
        """Wait up to `seconds` altogether for the work in hand."""
        deadline = time.monotonic() + seconds
        with self._guard:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
