"""How many logs have their files open. Floor 1.

A thousand stopped containers have logs that were looked at once; only the ones used last keep descriptors. The others
keep their index and open again when they are read. Thread-safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from engine.logs import ContainerLogs

MOST = 64


class Recent:
    """The logs used last, of one owner."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._order: OrderedDict[ContainerLogs, None] = OrderedDict()

    def used(self, logs: ContainerLogs) -> ContainerLogs:
        """`logs` again; whichever has not been used for longest closes its files when there are too many."""
        with self._lock:
            self._order[logs] = None
            self._order.move_to_end(logs)
            old = self._order.popitem(last=False)[0] if len(self._order) > self._most else None
        if old is not None:
            old.rest()
        return logs

    def forget(self, logs: ContainerLogs) -> None:
        with self._lock:
            self._order.pop(logs, None)
