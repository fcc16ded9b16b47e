"""An empty disk, ready for the next virtual machine: making one takes longer than all else before a start. Floor 2.

Only here: `place` holds one at most, of the image and size used last, under a name that says both, whole and durable.
It is made aside, a moment after one was used, when the CPUs are no longer that machine's. Thread-safe.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from engine import host
from engine.errors import EngineError
from engine.model import hex_of

log = logging.getLogger(__name__)

LATER_SECONDS = 1.0


class Blanks:
    """`make(path, chain_id, size)` makes one."""

    def __init__(self, place: Path, make: Callable[[Path, str, int], None]) -> None:
        self._place, self._make = place, make
        self._lock = threading.Lock()  # of the two below
        self._wanted: tuple[str, int] | None = None
        self._closed = False
        self._making = threading.Lock()  # held over I/O

    def take(self, chain_id: str, size: int, to: Path) -> bool:
        """Whether there was one, which is at `to` now. Another is made in a moment."""
        with self._lock:
            idle, self._wanted = self._wanted is None, (chain_id, size)
        if idle:
            later = threading.Timer(LATER_SECONDS, self._fill)
            later.daemon = True
            later.start()
        try:
            os.rename(self._place / _name(chain_id, size), to)
        except FileNotFoundError:
            return False
        return True

    def _fill(self) -> None:
        with self._making:
            with self._lock:
                wanted, self._wanted = self._wanted, None
                if self._closed or wanted is None:
                    return
            aside = self._place / "making.ext4"
            name = _name(*wanted)
            try:
                self._place.mkdir(mode=0o700, exist_ok=True)
                for left in self._place.iterdir():
                    if left.name != name:
                        host.remove_tree(left)
                if not (self._place / name).exists():
                    self._make(aside, *wanted)
                    os.rename(aside, self._place / name)
            except (EngineError, OSError) as error:
                log.warning("no disk is ready for the next virtual machine: %s", error)

    def close(self) -> None:
        """What is being made is waited for."""
        with self._lock:
            self._closed = True
        with self._making:
            return


def _name(chain_id: str, size: int) -> str:
    return f"{hex_of(chain_id)}-{size}"
