"""Logs that are in use, and how many of them have their files open. Floor 1.

A thousand stopped containers have logs that were looked at once; only the ones used last keep descriptors. The others
keep their index and open again when they are read. Thread-safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Generic, TypeVar

from engine.logs import ContainerLogs

MOST = 64

Key = TypeVar("Key", bound=Hashable)


class OpenLogs(Generic[Key]):
    """Those of one owner, by its keys."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._logs: dict[Key, ContainerLogs] = {}
        self._recent: OrderedDict[Key, None] = OrderedDict()  # who has files open

    def known(self, key: Key) -> ContainerLogs | None:
        """The logs that were opened for `key`."""
        with self._lock:
            logs = self._logs.get(key)
        return None if logs is None else self._used(key, logs)

    def open(self, key: Key, directory: Path) -> ContainerLogs:
        """The logs of `key`, which are in `directory`."""
        with self._lock:
            logs = self._logs.get(key)
            if logs is None:
                logs = self._logs[key] = ContainerLogs(directory)
        return self._used(key, logs)

    def _used(self, key: Key, logs: ContainerLogs) -> ContainerLogs:
        """Whichever has not been used for longest closes its files when there are too many."""
        with self._lock:
            if key in self._logs:
                self._recent[key] = None
                self._recent.move_to_end(key)
            over = len(self._recent) > self._most
            old = self._logs[self._recent.popitem(last=False)[0]] if over else None
        if old is not None:
            old.rest()
        return logs

    def drop(self, key: Key) -> None:
        """Close those of `key`. Idempotent."""
        with self._lock:
            logs = self._logs.pop(key, None)
            self._recent.pop(key, None)
        if logs is not None:
            logs.close()

    def close(self) -> None:
        """All of them."""
        with self._lock:
            logs = list(self._logs.values())
            self._logs.clear()
            self._recent.clear()
        for item in logs:
            item.close()
