"""Sizes of volumes: measured by a thread of their own and remembered. Floor 2, thread-safe.

Only here: how long a reader waits (hardly) and how old an answer may be.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.errors import EngineError

log = logging.getLogger(__name__)

FRESH = 5.0  # seconds a measured size is good for
PATIENCE = 0.2  # seconds a reader waits for a first measurement
MOST = 16  # measured at the same time; who asks for more gets what is known, and asks again


@dataclass(slots=True)
class _Size:
    value: int | None = None
    at: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)
    running: bool = False


class Sizes:
    """`measure(name)` may take long."""

    def __init__(self, measure: Callable[[str], int]) -> None:
        self._measure = measure
        self._guard = threading.Lock()
        self._sizes: dict[str, _Size] = {}
        self._running = 0

    def known(self, name: str) -> int | None:
        """As last measured, without waiting. None: not yet."""
        return self._ask(name)[0].value

    def soon(self, name: str) -> int:
        """As measured within PATIENCE, else as last known, else 0."""
        size, fresh = self._ask(name)
        if not fresh and size.running:
            size.done.wait(PATIENCE)
        return size.value or 0

    def forget(self, name: str) -> None:
        with self._guard:
            self._sizes.pop(name, None)

    def _ask(self, name: str) -> tuple[_Size, bool]:
        """What is known, and whether that is fresh; if not, a thread measures."""
        with self._guard:
            size = self._sizes.setdefault(name, _Size())
            fresh = size.value is not None and time.monotonic() - size.at < FRESH
            if not fresh and not size.running and self._running < MOST:
                size.running = True
                self._running += 1
                size.done.clear()
                threading.Thread(target=self._run, args=(name, size), name=f"size-{name}"[:15], daemon=True).start()
        return size, fresh

    def _run(self, name: str, size: _Size) -> None:
        try:
            size.value = self._measure(name)
        except (OSError, EngineError) as error:
            log.info("size of volume %s: %s", name, error)
        finally:
            size.at = time.monotonic()
            with self._guard:
                size.running = False
                self._running -= 1
            size.done.set()
